"""What FlashInfer is given of a step, with a stand-in that reads the same pages and computes with the reference."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moe_kernels.attention import flashinfer as adapter
from moe_kernels.attention import paged_attention
from tests.kernels.interpreted.test_attention import Case, make
from tests.kernels.packing import assert_near, pack

HEADS = (4, 2, 64)
DECODES = 2
QUERY_LENS, CONTEXT_LENS = [1, 1, 20, 0, 1, 33], [37, 15, 21, 4, 0, 0]


class WrapperStandIn:
    """Takes the place of either wrapper; keeps how it was made and planned."""

    made: list[WrapperStandIn]

    def __init__(self, workspace: torch.Tensor, kv_layout: str, **options: Any) -> None:
        assert workspace.dtype == torch.uint8
        assert not workspace.any()
        assert kv_layout == "NHD"
        self.options, self.plans, self.runs = options, [], 0
        self.made.append(self)

    def run(self, q: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Attention of each sequence's last tokens to what stands in its pages."""
        self.runs += 1
        starts, kv_starts, ids, last, heads, kv_heads, size, page, options = self.plans[-1]
        assert q.shape == (starts[-1], heads, size)
        assert caches[0].shape[1:] == (page, kv_heads, size)
        assert (options["q_data_type"], options["kv_data_type"]) == (q.dtype, caches[0].dtype)
        outs = []
        for i, count in enumerate(starts.diff().tolist()):
            table = ids[kv_starts[i] : kv_starts[i + 1]]
            length = (len(table) - 1) * page + int(last[i])
            slots = torch.cat([torch.arange(page) + block * page for block in table])[length - count : length]
            k, v = (cache.flatten(0, 1)[slots] for cache in caches)
            tokens = q[starts[i] : starts[i + 1]]
            sequences = pack([count], [length - count])
            outs.append(
                paged_attention(tokens, k, v, *caches, slots, table[None], sequences, options["sm_scale"])
            )
        return torch.cat(outs)


class DecodeStandIn(WrapperStandIn):
    def plan(self, indptr: torch.Tensor, *rest: Any, **options: Any) -> None:
        starts = torch.arange(len(indptr), dtype=torch.int32)
        self.plans.append((starts, indptr, *rest, options))


class PrefillStandIn(WrapperStandIn):
    def plan(self, *rest: Any, causal: bool, **options: Any) -> None:
        assert causal
        self.plans.append((*rest, options))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[WrapperStandIn]]:
    module = types.ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = DecodeStandIn  # type: ignore[attr-defined]
    module.BatchPrefillWithPagedKVCacheWrapper = PrefillStandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(WrapperStandIn, "made", [], raising=False)
    adapter._wrappers.cache_clear()
    yield WrapperStandIn.made
    adapter._wrappers.cache_clear()


def check(case: Case) -> None:
    wanted, wanted_caches = case.run("reference", torch.float64)
    out, caches = case.run("flashinfer", torch.bfloat16)
    assert_near(out, wanted)
    torch.testing.assert_close(caches.double(), wanted_caches, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("has_gate", [True, False])
def test_decodes_and_prefills_are_planned_apart(has_gate: bool, made: list[WrapperStandIn]) -> None:
    case = make(QUERY_LENS, CONTEXT_LENS, DECODES, HEADS, torch.bfloat16, has_gate=has_gate)
    check(case)
    decode, prefill = made
    assert decode.options == {"use_tensor_cores": True}
    ((_, indptr, ids, last, *sizes, _),) = decode.plans
    assert (indptr.tolist(), last.tolist(), sizes) == ([0, 3, 4], [6, 16], [4, 2, 64, 16])
    assert ids.tolist() == [*case.tables[0, :3].tolist(), int(case.tables[1, 0])]
    assert {x.dtype for x in (indptr, ids, last)} == {torch.int32}
    ((starts, indptr, ids, last, *sizes, _),) = prefill.plans
    assert starts.tolist() == [0, 20, 21, 54]
    assert (indptr.tolist(), last.tolist(), sizes) == ([0, 3, 4, 7], [9, 1, 1], [4, 2, 64, 16])
    assert len(ids) == 7


def test_a_step_is_planned_once_for_all_layers_and_the_next_anew(made: list[WrapperStandIn]) -> None:
    case = make(QUERY_LENS, CONTEXT_LENS, DECODES, HEADS, torch.bfloat16)
    check(case)
    check(case)
    assert [(len(wrapper.plans), wrapper.runs) for wrapper in made] == [(1, 2), (1, 2)]
    check(make(QUERY_LENS, CONTEXT_LENS, DECODES, HEADS, torch.bfloat16))
    assert [(len(wrapper.plans), wrapper.runs) for wrapper in made] == [(2, 3), (2, 3)]


def test_a_step_of_one_kind_plans_the_other_not(made: list[WrapperStandIn]) -> None:
    check(make([1, 1], [5, 40], 2, HEADS, torch.bfloat16))
    assert [len(wrapper.plans) for wrapper in made] == [1, 0]
    check(make([7], [5], 0, HEADS, torch.bfloat16))
    assert [len(wrapper.plans) for wrapper in made] == [1, 1]


def test_no_tokens_need_no_plan(made: list[WrapperStandIn]) -> None:
    check(make([], [], 0, HEADS, torch.bfloat16))
    check(make([0], [3], 0, HEADS, torch.bfloat16))
    assert made == []
