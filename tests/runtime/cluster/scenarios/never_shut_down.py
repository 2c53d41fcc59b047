"""An AsyncLLM that its program leaves open, as one does by mistake.

python never_shut_down.py MAX_TOKENS
"""

from __future__ import annotations

import asyncio
import sys

from moe_runtime import AsyncLLM, SamplingParams, StructuredOutputsParams


async def main(max_tokens: int) -> None:
    llm = await AsyncLLM.start(expert_parallel_size=2, device="cpu")
    # Its grammar is checked in a process of its own.
    chosen = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["yes", "no"]))
    for params in (chosen, SamplingParams(max_tokens=max_tokens, ignore_eos=True)):
        async for _ in llm.generate("Once", params):
            pass
        print("@answered", flush=True)


asyncio.run(main(int(sys.argv[1])))
