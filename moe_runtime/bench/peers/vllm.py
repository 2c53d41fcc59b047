"""The same checkpoint in vLLM, through its offline API, in this process."""

from __future__ import annotations

import os
import time
from typing import Any


class Peer:
    """vLLM on this machine's device."""

    def __init__(self, settings: dict[str, Any]) -> None:
        # One process, so that a signal that stops it stops all of it; and no binding of threads to cores, which
        # no other system here does either.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # GiB. Else it wants 92% of the machine's memory to be free, where the other systems' weights are too.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
        import vllm

        chosen = {
            "dtype": settings["variant"],
            "max_model_len": settings["max_len"],
            "max_num_seqs": settings["max_seqs"],
            # The prompts of a batch in one step: the first tokens then come together.
            "max_num_batched_tokens": max(settings["max_prompt_tokens"], settings["max_len"]),
            "enable_prefix_caching": False,  # no prompt comes twice
        }
        self._llm = vllm.LLM(
            model=settings["checkpoint"], skip_tokenizer_init=True, disable_log_stats=False, **chosen
        )
        self._vllm = vllm
        self.facts = {"version": vllm.__version__, "settings": chosen}

    def generate(self, prompts: list[list[int]], output_len: int, tune: bool) -> dict[str, Any]:
        """`output_len` greedy tokens after each prompt; there is nothing to tune."""
        params = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        began = time.perf_counter()
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        latencies: list[Any] = [getattr(output.metrics, "first_token_latency", None) for output in outputs]
        return {
            "seconds": seconds,
            "first_token_seconds": None if None in latencies else max(latencies),
            "decode_tokens": len(prompts) * (output_len - 1),
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        }
