"""`moe-runtime generate`: what it prints."""

from __future__ import annotations

import pytest

from moe_runtime.cli.main import main
from tests.demo_reference import greedy_text

# Those of `make demo`; in fewer tokens a router that takes an expert too few does not show.
PROMPT = "The experts of this model"
NUM_TOKENS = 48


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_without_a_model_it_writes_what_transformers_writes_with_the_demo(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--temperature", "0", "--max-tokens", str(NUM_TOKENS), "--dtype", "float32"]
    flags += ["--threads-per-rank", "1"]
    assert main(["generate", "--prompt", PROMPT, *flags]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{PROMPT}{greedy_text(PROMPT, NUM_TOKENS)}\n"
    assert f"{NUM_TOKENS} tokens in" in printed.err
