"""Experts as Triton kernels: nothing is read back to the host, and a CUDA graph can hold it all.

Shape legend: G tokens after dispatch, K top-k, M = G * K choices, L local experts, H hidden, F intermediate.
"""

from __future__ import annotations

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.custom_op import custom_op
from moe_kernels.grouped_gemm import sorted_rows, tiny
from moe_kernels.grouped_gemm.align import align
from moe_kernels.grouped_gemm.launch import GroupedGemmLaunch, default_launch, from_ints
from moe_kernels.grouped_gemm.tiles import PREFILL, TINY, TileConfig
from moe_kernels.grouped_gemm.weights import BYTES, NATIVE, PLAIN
from moe_kernels.quant.triton import quantize_activations

SUM_BLOCK = 1024


def fused_experts(
    x_GH: torch.Tensor,
    local_ids_GK: torch.Tensor,
    weights_GK: torch.Tensor,
    gate_up_L2FH: torch.Tensor,
    down_LHF: torch.Tensor,
    gate_up_scale: torch.Tensor | None = None,
    down_scale: torch.Tensor | None = None,
    *,
    launch: GroupedGemmLaunch | None = None,
) -> torch.Tensor:
    """See `moe_kernels.grouped_gemm.fused_experts`.

    Raises ValueError for int8 weights, and for activations in float64.
    """
    if gate_up_L2FH.dtype == torch.int8:
        raise ValueError("the Triton experts have no int8 weights; wanted the model's dtype or float8_e4m3fn")
    if x_GH.dtype == torch.float64:
        raise ValueError("the Triton experts accumulate in float32; x is torch.float64")
    if x_GH.shape[0] == 0 or local_ids_GK.shape[1] == 0 or gate_up_L2FH.shape[0] == 0:
        return torch.zeros_like(x_GH)
    launch = launch or default_launch(local_ids_GK.shape[1], gate_up_L2FH)
    values = launch.to_ints(x_GH.shape[0])
    tensors = (x_GH, local_ids_GK, weights_GK, gate_up_L2FH, down_LHF, gate_up_scale, down_scale)
    return _fused_experts(*(None if t is None else t.contiguous() for t in tensors), values)


@custom_op(
    "fused_experts(Tensor x, Tensor ids, Tensor weights, Tensor gate_up, Tensor down, Tensor? gate_up_scale, "
    "Tensor? down_scale, int[] launch) -> Tensor",
    fake=lambda x, *_: torch.empty_like(x),
)
def _fused_experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    launch: list[int],
) -> torch.Tensor:
    regime, native_fp8, num_multiprocessors, gate_up_tile, down_tile = from_ints(launch)
    if gate_up_scale is None or down_scale is None:
        mode, gate_up_scale, down_scale = PLAIN, x, x  # never read
    else:
        mode = NATIVE if native_fp8 and regime != TINY else BYTES
    if mode == BYTES:
        gate_up, down = gate_up.view(torch.uint8), down.view(torch.uint8)
    tensors = (x, ids, weights, gate_up, down, gate_up_scale, down_scale)
    if regime == TINY:
        return _run_tiny(*tensors, mode, gate_up_tile, down_tile)
    persistent = num_multiprocessors if regime == PREFILL else None
    return _run_sorted(*tensors, mode, gate_up_tile, down_tile, persistent)


def _run_tiny(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_scale: torch.Tensor,
    mode: int,
    gate_up_tile: TileConfig,
    down_tile: TileConfig,
) -> torch.Tensor:
    (tokens, hidden), (_, top_k), inner = x.shape, ids.shape, down.shape[2]
    h, y = x.new_empty(tokens * top_k, inner), torch.empty_like(x)
    sizes = {"H": hidden, "F": inner, "TOP_K": top_k, "MODE": mode}
    grid = (triton.cdiv(inner, gate_up_tile.block_n), tokens * top_k)
    tiny.gate_up_tiny[grid](
        x, gate_up, gate_up_scale, ids, h, **sizes, **_options(gate_up_tile, "BN", "BK", "STAGES")
    )
    grid = (triton.cdiv(hidden, down_tile.block_n), tokens)
    tiny.down_tiny[grid](
        h, down, down_scale, ids, weights, y, **sizes, **_options(down_tile, "BN", "BK", "STAGES")
    )
    return y


def _run_sorted(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_scale: torch.Tensor,
    mode: int,
    gate_up_tile: TileConfig,
    down_tile: TileConfig,
    num_multiprocessors: int | None,
) -> torch.Tensor:
    (tokens, hidden), (_, top_k), (local, _, inner) = x.shape, ids.shape, down.shape
    rows = align(ids, local, gate_up_tile.block_m)
    h, parts = x.new_empty(tokens * top_k, inner), x.new_empty(tokens * top_k, hidden)
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    sizes = {"H": hidden, "F": inner, "L": local, "MODE": mode, "PRECISION": precision}
    order = (rows.choices_M, rows.offsets_L, rows.tiles)

    codes, scale = quantize_activations(x) if mode == NATIVE else (x, x)
    grid = _grid(rows.max_tiles * triton.cdiv(inner, gate_up_tile.block_n), gate_up_tile, num_multiprocessors)
    sorted_rows.gate_up[grid](
        codes, scale, _weights(gate_up, gate_up_tile), gate_up_scale, *order, h, rows.max_tiles, TOP_K=top_k,
        **sizes, **_options(gate_up_tile, "BM", "BN", "BK", "SWAP", "TMA", "SPECIALIZE"),
    )  # fmt: skip
    codes, scale = quantize_activations(h, rows.offsets_L[local:]) if mode == NATIVE else (h, h)
    grid = _grid(rows.max_tiles * triton.cdiv(hidden, down_tile.block_n), down_tile, num_multiprocessors)
    sorted_rows.down[grid](
        codes, scale, _weights(down, down_tile), down_scale, weights, *order, parts, rows.max_tiles,
        **sizes, **_options(down_tile, "BM", "BN", "BK", "SWAP", "TMA", "SPECIALIZE"),
    )  # fmt: skip
    y = torch.empty_like(x)
    sorted_rows.sum_choices[(tokens, triton.cdiv(hidden, SUM_BLOCK))](
        parts, ids, y, H=hidden, TOP_K=top_k, BLOCK=SUM_BLOCK
    )
    return y


def _grid(num_items: int, tile: TileConfig, num_multiprocessors: int | None) -> tuple[int]:
    """A program for each item, or as many as run at once.

    One more would start when the others are nearly done, and its items would come when their weights are no longer in
    the L2 cache.
    """
    return (
        num_items if num_multiprocessors is None else min(num_items, tile.programs * num_multiprocessors),
    )


def _weights(w: torch.Tensor, tile: TileConfig) -> torch.Tensor | TensorDescriptor:
    """All experts' rows under each other, as the kernel takes them."""
    if not tile.tma:
        return w
    return TensorDescriptor.from_tensor(w.view(-1, w.shape[2]), [tile.block_n, tile.block_k])


def _options(tile: TileConfig, *names: str) -> dict[str, int | bool]:
    values = {
        "BM": tile.block_m,
        "BN": tile.block_n,
        "BK": tile.block_k,
        "SWAP": tile.swap,
        "TMA": tile.tma,
        "SPECIALIZE": tile.warp_specialize,
        "STAGES": tile.num_stages,
    }
    chosen = {name: values[name] for name in names}
    return {**chosen, "num_warps": tile.num_warps, "num_stages": tile.num_stages}
