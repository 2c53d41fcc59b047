"""What a model through the Triton kernels must compute, on any device: for the interpreter and for real GPUs."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from tests.kernels.packing import assert_near
from tests.models.model_harness import Harness, load_model
from tests.models.triton_plan import triton_plan

Steps = list[dict[str, list[int]]]

_PROMPTS = {"a": 70, "b": 1, "c": 33, "d": 2}
# Tokens of each sequence in each step: less than the convolution's history, and more than a chunk.
_MIXED = [{"a": 5, "b": 2}, {"b": 1, "a": 66}, {"a": 2, "b": 1, "c": 1}, {"b": 1, "a": 1, "c": 4}, {}]


def check_prompts(checkpoint: Path, device: str, dtype: torch.dtype = torch.float32) -> None:
    """Prompts of many lengths in one step."""
    _check([_tokens(_PROMPTS)], checkpoint, device, dtype)


def check_mixed_steps(checkpoint: Path, device: str, dtype: torch.dtype = torch.float32) -> None:
    """Parts of prompts beside decodes, and a step without tokens."""
    _check([_tokens(sizes) for sizes in _MIXED], checkpoint, device, dtype)


def _tokens(sizes: dict[str, int]) -> dict[str, list[int]]:
    rng = random.Random(len(sizes))
    return {name: rng.choices(range(1, 199), k=size) for name, size in sizes.items()}


def _check(steps: Steps, checkpoint: Path, device: str, dtype: torch.dtype) -> None:
    """Triton in `dtype` on `device` against the references in float64 on the host."""
    ours = Harness(load_model(checkpoint, dtype=dtype, plan=triton_plan(), device=device), device=device)
    exact = Harness(load_model(checkpoint, dtype=torch.float64))
    for tokens in steps:
        got, wanted = ours.step(tokens), exact.step(tokens)
        assert list(got) == list(wanted)
        for name, logprobs in got.items():
            assert_near(logprobs.cpu(), wanted[name].double())
