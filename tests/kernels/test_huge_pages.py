"""advise_huge_pages: the advice reaches the tensor's own memory and no other, and changes no value."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from moe_kernels.huge_pages import advise_huge_pages

_SMAPS = Path("/proc/self/smaps")
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def advised_ranges() -> list[tuple[int, int]]:
    """Address ranges of this process that carry the advice ("hg")."""
    ranges = []
    for area in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", _SMAPS.read_text()):
        flags = re.search(r"^VmFlags:(.*)$", area, re.MULTILINE)
        if flags and "hg" in flags.group(1).split():
            start, end = area.split(maxsplit=1)[0].split("-")
            ranges.append((int(start, 16), int(end, 16)))
    return ranges


@pytest.mark.skipif(
    not (_SMAPS.exists() and _THP.exists()), reason="the system has no transparent huge pages"
)
def test_the_whole_huge_pages_within_a_tensor_are_advised_and_no_others() -> None:
    before = set(advised_ranges())
    tensor = torch.empty(9 << 20, dtype=torch.int8)
    advise_huge_pages([tensor])
    covered = sum(
        min(end, tensor.data_ptr() + tensor.nbytes) - max(start, tensor.data_ptr())
        for start, end in advised_ranges()
        if start < tensor.data_ptr() + tensor.nbytes and end > tensor.data_ptr()
    )
    assert covered >= 6 << 20
    for start, _ in set(advised_ranges()) - before:
        assert start >= tensor.data_ptr() or any(a <= start < b for a, b in before)
        assert start % (2 << 20) == 0 or any(a <= start < b for a, b in before)


@pytest.mark.parametrize("size", [0, 1, 5 << 20])
def test_values_stay(size: int) -> None:
    tensor = torch.arange(size, dtype=torch.int32)
    advise_huge_pages([tensor])
    assert torch.equal(tensor, torch.arange(size, dtype=torch.int32))


def test_tensors_elsewhere_are_left_alone() -> None:
    advise_huge_pages([torch.empty(4 << 20, device="meta")])
