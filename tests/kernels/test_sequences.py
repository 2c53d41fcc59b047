"""The tables that kernels with a state read of a step's prefills."""

from __future__ import annotations

from dataclasses import fields

import pytest

from tests.kernels.packing import pack


def test_chunks_are_counted_anew_after_each_checkpoint_and_tiles_are_not() -> None:
    # A decode, a continued sequence, one without tokens, a new one.
    sequences = pack([1, 130, 0, 5], [9, 4, 3, 0], 1, [(1, 1, 20), (1, 70, 21), (3, 5, 22)])
    tables = sequences.prefill_tables
    assert tables is not None
    assert tables.chunks_C3.tolist() == [
        [1, 1, 20],
        [2, 64, -1],
        [66, 5, 21],
        [71, 60, -1],
        [131, 5, 22],
    ]
    assert tables.sequences_S8.tolist() == [[1, 1, 1, 130, 0, 4, 0, 2], [3, 0, 131, 5, 4, 5, 2, 3]]
    assert tables.tiles_L2.tolist() == [[0, 0], [0, 64], [0, 128], [1, 0]]
    assert tables.checkpoints_P2.tolist() == [[1, 20], [70, 21], [5, 22]]
    assert sequences.prefill_cu_seqlens.tolist() == [0, 130, 135]
    assert sequences.prefill_chunk_indices.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0]]


@pytest.mark.parametrize(
    ("query_lens", "checkpoints"),
    [([1, 130, 0, 5], [(1, 1, 20), (3, 5, 22)]), ([1, 3], []), ([1, 64, 2, 9], [(2, 1, 8)])],
)
def test_tables_start_at_multiples_of_16_bytes(
    query_lens: list[int], checkpoints: list[tuple[int, int, int]]
) -> None:
    tables = pack(query_lens, [9, 4, 3, 0][: len(query_lens)], 1, checkpoints).prefill_tables
    assert tables is not None
    for field in fields(tables):
        table = getattr(tables, field.name)
        assert table.is_contiguous()
        assert table.data_ptr() % 16 == 0


def test_tables_are_made_once_and_not_for_decodes_alone() -> None:
    sequences = pack([1, 3], [2, 0], 1)
    assert sequences.prefill_tables is sequences.prefill_tables
    assert pack([1, 1], [2, 5], 2).prefill_tables is None
    assert pack([], []).prefill_tables is None


def test_what_the_decodes_attend_to() -> None:
    assert pack([1, 1, 7], [2, 5, 90], 2).decode_tokens == (6, 9)
    assert pack([7], [0]).decode_tokens == (0, 0)
