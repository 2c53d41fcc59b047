"""How the decodes' contexts are cut, and how many queries a program of the prefill has."""

from __future__ import annotations

import pytest
import torch

from moe_kernels.attention.launch import AttentionLaunch, launch_for
from moe_kernels.sequences import PREFILL_CHUNK


@pytest.mark.parametrize(
    ("lengths", "kv_heads", "wanted"),
    [
        ([2], 2, (128, 1)),  # a short context is not cut
        ([129], 2, (128, 2)),
        ([8192], 2, (128, 64)),
        ([100_000], 2, (768, 131)),  # as many programs as are wanted
        ([1000] * 512, 2, (3968, 1)),  # enough sequences: no cuts
        ([100_000] + [100] * 63, 2, (6272, 16)),  # a long one among short ones is cut, within bounds
    ],
)
def test_splits(lengths: list[int], kv_heads: int, wanted: tuple[int, int]) -> None:
    launch = AttentionLaunch(decode_programs=264)
    rows, total = len(lengths) * kv_heads, sum(lengths) * kv_heads
    tokens, count = launch.splits(rows, max(lengths), total)
    assert (tokens, count) == wanted
    assert tokens * (count - 1) < max(lengths) <= tokens * count
    # Programs, and so the scratch of their results, stay within bounds.
    assert rows * count <= max(rows, 8 * 264)


@pytest.mark.parametrize("group", [1, 3, 6, 8, 16, 32, 48, 200])
@pytest.mark.parametrize("rows", [16, 64, 128])
def test_the_prefill_covers_a_tile_with_few_idle_rows(rows: int, group: int) -> None:
    blocks = AttentionLaunch(prefill_rows=rows).prefill_blocks(group)
    programs = -(-PREFILL_CHUNK // blocks["TOKENS"])
    assert blocks["TOKENS"] * group <= blocks["BLOCK_R"]
    assert blocks["TOKENS"] * (programs - 1) < PREFILL_CHUNK
    # A program has all heads of one token at least, and a power of two of rows.
    assert blocks["BLOCK_R"] <= max(rows, 16, 2 * group)


def test_other_devices_than_nvidias_get_the_smallest_blocks() -> None:
    default = AttentionLaunch()
    assert launch_for(None, 304, torch.bfloat16, 256) == default
    hopper = launch_for((9, 0), 132, torch.bfloat16, 256)
    assert hopper.prefill_rows > default.prefill_rows
    assert hopper.decode_programs == 264


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_heads_that_fill_the_registers_get_the_smallest_blocks(capability: tuple[int, int]) -> None:
    large, default = launch_for(capability, 132, torch.bfloat16, 512), AttentionLaunch()
    assert (large.prefill_rows, large.prefill_tokens) == (default.prefill_rows, default.prefill_tokens)
    assert (large.prefill_stages, large.decode_stages) == (default.prefill_stages, default.decode_stages)
    assert large.decode_programs == 264


def test_a_launch_is_the_same_after_a_list() -> None:
    launch = launch_for((9, 0), 132, torch.bfloat16, 256)
    assert AttentionLaunch.from_list(launch.to_list()) == launch
