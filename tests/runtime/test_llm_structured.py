"""Structured outputs through the whole engine: a driver, two ranks, and what is refused before it gets there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import jsonschema
import pytest

from moe_runtime import LLM, SamplingParams, StructuredOutputsParams
from moe_runtime.async_llm import AsyncLLM
from moe_runtime.errors import ConfigError
from moe_runtime.outputs import RequestOutput

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "n"],
}


@pytest.fixture(scope="module")
def llm(ray_session: None) -> Iterator[LLM]:
    with LLM(expert_parallel_size=2, dtype="float32", use_tqdm=False) as started:
        yield started


def test_structured_requests_go_through_ranks_beside_free_ones_and_the_refused_reach_none(llm: LLM) -> None:
    form = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)
    structured = SamplingParams(n=2, temperature=1.0, max_tokens=60, seed=3, structured_outputs=form)
    free = SamplingParams(temperature=1.0, max_tokens=20, seed=4)
    (alone,) = llm.generate("The experts", free, use_tqdm=False)
    mixed = llm.generate(["a", "The experts", "b"], [structured, free, structured], use_tqdm=False)
    assert mixed[1].outputs[0].token_ids == alone.outputs[0].token_ids
    for output in (mixed[0], mixed[2]):
        for completion in output.outputs:
            assert completion.finish_reason == "stop"
            jsonschema.validate(json.loads(completion.text), SCHEMA)

    nothing = SamplingParams(structured_outputs=StructuredOutputsParams(grammar="root ::= root"))
    with pytest.raises(ConfigError, match=r"structured_outputs\.grammar is refused"):
        llm.generate(["a", "b"], [free, nothing], use_tqdm=False)

    bias = dict.fromkeys(range(3), -1000000000.0) | {llm.get_tokenizer().encode("a", False)[0]: float("-inf")}
    doomed = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["a"]), logit_bias=bias, n=2)
    with pytest.raises(ConfigError, match="logit_bias leave no token to sample"):
        llm.generate("x", doomed, use_tqdm=False)
    assert llm.generate("The experts", free, use_tqdm=False)[0].outputs == alone.outputs


def test_an_event_loop_goes_on_while_a_grammar_is_checked(llm: LLM) -> None:
    engine = AsyncLLM(llm._frontend)
    params = SamplingParams(max_tokens=60, structured_outputs=StructuredOutputsParams(regex="[a-f]{3}!"))

    async def run() -> tuple[list[RequestOutput], int]:
        ticks, done = 0, asyncio.Event()

        async def tick() -> None:
            nonlocal ticks
            while not done.is_set():
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        outputs = [output async for output in engine.generate("a", params)]
        done.set()
        await ticking
        return outputs, ticks

    outputs, ticks = asyncio.run(run())
    assert outputs[-1].outputs[0].text[-1] == "!"
    assert ticks > 1
