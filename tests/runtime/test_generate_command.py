"""`moe-runtime generate`: what it prints."""

from __future__ import annotations

import pytest

from moe_runtime.cli.main import main
from tests.demo_reference import greedy_text

PROMPT = "The experts of this model"  # of `make demo`


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_without_a_model_it_writes_what_transformers_writes_with_the_demo(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--temperature", "0", "--max-tokens", "16", "--dtype", "float32", "--threads-per-rank", "1"]
    assert main(["generate", "--prompt", PROMPT, *flags]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{PROMPT}{greedy_text(PROMPT, 16)}\n"
    assert "16 tokens in" in printed.err
