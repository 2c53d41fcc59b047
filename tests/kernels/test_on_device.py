"""Moving an operation's tensors to another device keeps their layout, and what it writes comes back."""

from __future__ import annotations

import torch

from moe_kernels.sequences import PackedSequences
from tests.gpu.on_device import on_device
from tests.kernels.packing import pack


def test_slices_of_one_tensor_stay_slices_of_one_tensor() -> None:
    wide = torch.arange(24.0).view(4, 6)
    left, right = wide[:, 1:3], wide[:, 3:]

    def operation(a: torch.Tensor, b: torch.Tensor) -> tuple[tuple[int, ...], int, bool, bool]:
        same = a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        return a.stride(), b.storage_offset(), same, torch.equal(a, left) and torch.equal(b, right)

    assert on_device(operation, "cpu")(left, right) == ((6, 1), 3, True, True)


def test_the_device_has_copies_and_what_is_written_to_them_comes_back() -> None:
    state, untouched = torch.zeros(3, 2), torch.ones(2)

    def operation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x[1] = 7.0
        assert state.sum() == 0
        return x + y

    out = on_device(operation, "cpu")(state[:2], untouched)
    assert torch.equal(out, torch.tensor([[1.0, 1.0], [8.0, 8.0]]))
    assert torch.equal(state, torch.tensor([[0.0, 0.0], [7.0, 7.0], [0.0, 0.0]]))


def test_packed_sequences_move_with_all_they_hold() -> None:
    sequences = pack([1, 3], [4, 0], 1)

    def operation(moved: PackedSequences, *, launch: None) -> bool:
        assert (moved.query_lens, moved.num_decodes) == ((1, 3), 1)
        assert torch.equal(moved.cu_seqlens, sequences.cu_seqlens)
        return moved.cu_seqlens.data_ptr() != sequences.cu_seqlens.data_ptr()

    assert on_device(operation, "cpu")(sequences, launch=None)
