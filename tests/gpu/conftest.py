"""Tests that need a GPU: `python -m pytest -m gpu`. Where there is none they are skipped and say so."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU is visible to this process")
