"""A model class defined in the driver's own script reaches the inspection and the ranks by value."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = '''
from moe_models.qwen3_next import Qwen3NextForCausalLM
from moe_runtime import LLM, SamplingParams


class Backwards(Qwen3NextForCausalLM):
    """The most probable token becomes the least probable."""

    def compute_logits(self, hidden_NH):
        return -super().compute_logits(hidden_NH)


params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=-1)
with LLM(model_class=Backwards, expert_parallel_size=2, dtype="float32", use_tqdm=False) as llm:
    assert "Backwards" in llm.info.model_class, llm.info.model_class
    (backwards,) = llm.generate("hello", params, use_tqdm=False)
with LLM(dtype="float32", use_tqdm=False) as llm:
    (plain,) = llm.generate("hello", params, use_tqdm=False)
ranks = {token: found.rank for token, found in plain.outputs[0].logprobs[0].items()}
assert ranks[backwards.outputs[0].token_ids[0]] == len(ranks) == 4096
print("by value")
'''


@pytest.mark.ray
@pytest.mark.slow
def test_a_class_of_the_drivers_script_is_shipped_by_value(tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(_SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ),
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "by value"), done.stderr
