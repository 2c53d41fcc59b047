"""The server in front of real ranks: the demo checkpoint, over a socket, with the official client."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest

from moe_runtime import AsyncLLM
from moe_runtime.cli.main import main
from moe_runtime.server.app import make_app
from tests.demo_reference import greedy_text
from tests.server.conftest import listening
from tests.server.fake_engine import server_config

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

NUM_STREAMS = 64
NUM_TOKENS = 16


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    created = asyncio.new_event_loop()
    yield created
    created.close()


@pytest.fixture(scope="module")
def llm(ray_session: None, loop: asyncio.AbstractEventLoop) -> Iterator[AsyncLLM]:
    started = loop.run_until_complete(AsyncLLM.start(expert_parallel_size=2, dtype="float32"))
    yield started
    loop.run_until_complete(started.shutdown())


@pytest.fixture
def served(
    llm: AsyncLLM, loop: asyncio.AbstractEventLoop
) -> Callable[[Callable[[openai.AsyncOpenAI], Awaitable[None]]], None]:
    """Run a scenario that is given a client."""

    def run(scenario: Callable[[openai.AsyncOpenAI], Awaitable[None]]) -> None:
        async def connected() -> None:
            async with (
                listening(make_app(llm, server_config())) as url,
                openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
            ):
                await scenario(client)

        loop.run_until_complete(asyncio.wait_for(connected(), 120))

    return run


async def _tokens(client: openai.AsyncOpenAI, number: int) -> list[int]:
    """Token ids of one streamed chat; every other is sampled, as greedy answers begin alike."""
    ids: list[int] = []
    stream: Any = await client.chat.completions.create(
        model="demo",
        messages=[
            {"role": "user", "content": f"Tell me a story about {number} experts. " * (1 + number % 3)}
        ],
        max_tokens=NUM_TOKENS,
        temperature=0.0 if number % 2 else 1.0,
        seed=number,
        stream=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    async for chunk in stream:
        ids += getattr(chunk.choices[0], "token_ids", [])
    return ids


def test_many_streams_at_once_get_the_tokens_that_each_gets_alone(served: Callable[..., None]) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        alone = [await _tokens(client, number) for number in range(NUM_STREAMS)]
        together = await asyncio.gather(*(_tokens(client, number) for number in range(NUM_STREAMS)))
        assert together == alone
        assert all(len(ids) == NUM_TOKENS for ids in alone)
        assert len({tuple(ids) for ids in alone}) > NUM_STREAMS // 2

    served(scenario)


def test_the_demo_answers_hello_as_with_transformers(served: Callable[..., None]) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        request: Any = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}
        answer = await client.chat.completions.create(**request, temperature=0, max_tokens=48)
        assert answer.choices[0].message.content == greedy_text(request["messages"], 48)
        assert answer.choices[0].finish_reason == "stop"

    served(scenario)


def test_a_whole_answer_is_the_stream_put_together(served: Callable[..., None]) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        request: Any = {
            "model": "demo",
            "prompt": "The experts",
            "max_tokens": 24,
            "seed": 3,
            "echo": True,
            "logprobs": 2,
        }
        whole = await client.completions.create(**request)
        pieces = [chunk.choices[0] async for chunk in await client.completions.create(**request, stream=True)]
        assert "".join(piece.text for piece in pieces) == whole.choices[0].text
        streamed = [token for piece in pieces for token in piece.logprobs.tokens]  # type: ignore[union-attr]
        assert streamed == whole.choices[0].logprobs.tokens  # type: ignore[union-attr]
        assert whole.choices[0].text.startswith("The experts")

    served(scenario)


def test_usage_counts_the_prompt_tokens_that_a_rank_had_cached(served: Callable[..., None]) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        found = []
        for _ in range(4):  # some rank gets it twice
            usage: Any = (
                await client.completions.create(model="demo", prompt=list(range(40, 440)), max_tokens=2)
            ).usage
            assert usage.prompt_tokens == 400
            found.append(usage.prompt_tokens_details.cached_tokens)
        assert found[0] == 0
        assert 300 < max(found) < 400

    served(scenario)


def test_a_stop_string_ends_the_answer_before_it(served: Callable[..., None]) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        request: Any = {"model": "demo", "prompt": "The experts", "max_tokens": 24, "temperature": 0}
        free = (await client.completions.create(**request)).choices[0].text
        stop = free[8:11]
        stopped = (await client.completions.create(**request, stop=[stop])).choices[0]
        assert stopped.text == free[: free.index(stop)]
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)  # type: ignore[attr-defined]

    served(scenario)


def test_leaving_a_stream_frees_the_rank(llm: AsyncLLM, served: Callable[..., None]) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        stream: Any = await client.completions.create(
            model="demo",
            prompt="The experts",
            max_tokens=8000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        async for _ in stream:
            break
        await stream.close()
        while not llm.is_idle or any(stats.scheduler["num_running"] for stats in await llm.stats()):
            await asyncio.sleep(0.02)

    served(scenario)


def test_health_and_ranks_ask_the_ranks(served: Callable[..., None]) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        base = str(client.base_url).removesuffix("/v1/")
        async with httpx2.AsyncClient(base_url=base) as http:
            assert (await http.get("/health")).json() == {"status": "ok"}
            ranks = (await http.get("/v1/ranks")).json()["data"]
        assert [rank["rank"] for rank in ranks] == [0, 1]
        assert all(rank["kernel_plan"] and rank["memory"]["weight_bytes"] for rank in ranks)
        assert sum(rank["load"]["loop"]["generation_tokens"] for rank in ranks) > 0

    served(scenario)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "number": {"type": "integer", "maximum": 99}},
    "required": ["name", "number"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("fields", "holds"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}},
            lambda text: set(json.loads(text)) == {"name", "number"},
        ),
        (
            {"extra_body": {"structured_outputs": {"regex": r"[a-f]{3}-\d{4}"}}},
            lambda text: re.fullmatch(r"[a-f]{3}-\d{4}", text),
        ),
        (
            {"extra_body": {"structured_outputs": {"choice": ["north", "south"]}}},
            lambda text: text in ("north", "south"),
        ),
        (
            {"extra_body": {"structured_outputs": {"grammar": 'root ::= "a"+ "b"'}}},
            lambda text: re.fullmatch("a+b", text),
        ),
    ],
    ids=["json_schema", "regex", "choice", "grammar"],
)
def test_structured_output(
    fields: dict[str, Any], holds: Callable[[str], Any], served: Callable[..., None]
) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        answer: Any = await client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "Which?"}],
            temperature=1.0,
            seed=3,
            max_tokens=120,
            **fields,
        )
        assert answer.choices[0].finish_reason == "stop", answer
        assert holds(answer.choices[0].message.content), answer

    served(scenario)


def test_a_schema_that_cannot_be_kept_is_refused_by_its_field(served: Callable[..., None]) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(
                model="demo",
                messages=[{"role": "user", "content": "Which?"}],
                extra_body={"structured_outputs": {"regex": "(unclosed"}},
            )
        assert refused.value.param == "structured_outputs.regex"

    served(scenario)


def _endless_grammar(number: int) -> str:
    """A grammar of its own for each number, none of which is compiled in 10 s."""
    every_pair = [f"r{i} r{j}" for i in range(10) for j in range(10)]
    rules = [f'r{i} ::= {" | ".join(every_pair)} | [a-z] | "{number}" | ""' for i in range(10)]
    return "\n".join(["root ::= r0", *rules])


def test_grammars_without_end_keep_neither_health_nor_others_waiting(served: Callable[..., None]) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        def ask(**form: str) -> Any:
            body: Any = {"model": "demo", "prompt": "a", "max_tokens": 4}
            return client.completions.create(**body, extra_body={"structured_outputs": form})

        assert (await ask(regex="b")).choices[0].text == "b"  # the process that checks has started
        # More than asyncio's own threads, so that checks in those would take every one.
        endless = [asyncio.create_task(ask(grammar=_endless_grammar(number))) for number in range(40)]
        await asyncio.sleep(1)  # all are at the server
        base = str(client.base_url).removesuffix("/v1/")
        async with httpx2.AsyncClient(base_url=base) as http:
            assert (await http.get("/health")).json() == {"status": "ok"}
        assert (await client.completions.create(model="demo", prompt="a", max_tokens=2)).choices
        assert not any(task.done() for task in endless)  # a check ends after 10 s: nobody waited for one
        for task in endless:
            task.cancel()
        await asyncio.gather(*endless, return_exceptions=True)
        # In turn after 40 of them this would take 400 s.
        assert (await ask(regex="c")).choices[0].text == "c"

    served(scenario)


def test_a_regex_that_backtracking_engines_die_of_is_kept(served: Callable[..., None]) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        answer = await client.completions.create(
            model="demo",
            prompt="a",
            max_tokens=40,
            extra_body={"structured_outputs": {"regex": "(a+)+(a+)+(a|aa)+b"}},
        )
        assert re.fullmatch("a{3,}b?", answer.choices[0].text), answer

    served(scenario)


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_bench_serve_measures_it(
    served: Callable[..., None], endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(client: openai.AsyncOpenAI) -> None:
        flags = ["--num-prompts", "6", "--random-input-len", "12", "--random-output-len", "5", "--ignore-eos"]
        command = ["bench", "serve", "--base-url", str(client.base_url), "--endpoint", endpoint, *flags]
        assert await asyncio.to_thread(main, command) == 0

    served(scenario)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    result = report["results"][0]
    assert report["workload"]["model"] == "demo"
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (6, 0, 30)
    assert result["outputs_counted_by_chunks"] == 0
    assert 0 < result["mean_ttft_ms"] <= result["mean_e2el_ms"]
    if endpoint == "/v1/completions":
        assert (report["workload"]["prompts_as"], result["total_input_tokens"]) == ("token ids", 6 * 12)
