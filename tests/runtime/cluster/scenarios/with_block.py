"""A program that goes on after its `with LLM(...)`: Ray and the ranks have gone by then."""

from __future__ import annotations

import psutil
import ray

from moe_runtime import LLM, SamplingParams

LONG = SamplingParams(max_tokens=4000, temperature=0, ignore_eos=True)

if __name__ == "__main__":
    with LLM(expert_parallel_size=2, device="cpu", use_tqdm=False) as llm:
        ranks = [psutil.Process(report.pid) for report in llm.ranks]
        stream = llm.stream("left open", LONG)
        next(stream)

    _, alive = psutil.wait_procs([*ranks, *psutil.Process().children(recursive=True)], timeout=10)
    assert not alive
    assert not ray.is_initialized()

    stream.close()  # a generator left open must not wake Ray again to tell the ranks
    assert not ray.is_initialized()
