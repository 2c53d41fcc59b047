"""A whole model through the Triton kernels against the same model through the references.

For Triton's interpreter, which has to be chosen before triton is imported: `tests/kernels/test_interpreted.py` runs
this file in a process of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.checkpoints import make_variant
from tests.models.triton_model import check_mixed_steps, check_prompts

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start"
)
VARIANTS = ["base", "equal_heads_odd_experts"]
# One of each kind of layer: the interpreter takes milliseconds for what a GPU does in microseconds.
LAYERS = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make_variant(path, request.param, **LAYERS)
    return path


@pytest.mark.slow  # the other test has prompts, too
def test_prompts_of_different_lengths_in_one_batch(checkpoint: Path) -> None:
    check_prompts(checkpoint, "cpu")


def test_chunked_prefills_beside_decodes(checkpoint: Path) -> None:
    check_mixed_steps(checkpoint, "cpu")
