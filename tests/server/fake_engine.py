"""An engine without ranks: it says what it is told to say, step by step, and keeps count of its requests."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import cache
from pathlib import Path

import moe_runtime
from moe_runtime.errors import EngineDeadError
from moe_runtime.modelfiles import resolve_model
from moe_runtime.rank_spec import RankReport, RankStats
from moe_runtime.request import (
    Logprob,
    OutputDelta,
    PromptInput,
    SamplingParams,
    parse_prompt,
    validate_prompt,
)
from moe_runtime.server.config import ServerConfig
from moe_runtime.tokenizer import Tokenizer, load_tokenizer

DEMO = Path(moe_runtime.__file__).parent / "demo_checkpoint"
REPLY = " the experts of this model are many, and each of them knows a little."


def server_config(**settings: object) -> ServerConfig:
    """One served model, "demo"."""
    return ServerConfig(**{"served_model_names": ("demo",), **settings})  # type: ignore[arg-type]


@cache
def _tokenizer() -> Tokenizer:
    return load_tokenizer(resolve_model(DEMO))


class FakeEngine:
    """Answers every prompt with the tokens of `reply`, then stops; has AsyncLLM's interface."""

    def __init__(self, reply: str = REPLY, max_model_len: int = 256) -> None:
        self.tokenizer = _tokenizer()
        self.default_sampling_params = SamplingParams(temperature=0.7)
        self.max_model_len = max_model_len
        self.reply_ids = self.tokenizer.encode(reply, add_special_tokens=False)
        self.gate = asyncio.Event()  # steps wait for it
        self.gate.set()
        self.error_after: tuple[int, Exception] | None = None  # tokens, and what is raised then
        self.healthy = True
        self.started: list[str] = []  # ids of requests in the order of their arrival
        self.params: list[SamplingParams] = []  # their parameters
        self.priorities: list[int] = []
        self.num_cached = [0]  # prompt tokens found cached, by sample; the last one goes for those after it
        self.running: set[str] = set()
        self.aborted: list[str] = []

    async def stream(
        self,
        prompt: PromptInput,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[OutputDelta]:
        params = sampling_params or self.default_sampling_params
        prompt_ids = parse_prompt(prompt).token_ids or ()
        validate_prompt(prompt_ids, 4096, self.max_model_len, params)
        request_id = request_id or uuid.uuid4().hex
        self.started.append(request_id)
        self.params.append(params)
        self.priorities.append(priority)
        self.running.add(request_id)
        ended = False
        try:
            for step in range(self._num_tokens(params)):
                await self.gate.wait()
                await asyncio.sleep(0)
                if self.error_after is not None and step == self.error_after[0]:
                    ended = True
                    raise self.error_after[1]
                for sample in range(params.n):
                    yield self._delta(request_id, prompt_ids, params, sample, step)
            ended = True
        finally:
            self.running.discard(request_id)
            if not ended:
                self.aborted.append(request_id)

    def _num_tokens(self, params: SamplingParams) -> int:
        limit = params.max_tokens or len(self.reply_ids)
        return limit if params.ignore_eos else min(limit, len(self.reply_ids))

    def _delta(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, sample: int, step: int
    ) -> OutputDelta:
        token_id = self.reply_ids[(step + sample) % len(self.reply_ids)]
        is_last = step + 1 == self._num_tokens(params)
        reached_limit = step + 1 == params.max_tokens
        wants_prompt = params.prompt_logprobs is not None and step == 0 and sample == 0
        return OutputDelta(
            request_id=request_id,
            sample_index=sample,
            new_token_ids=(token_id,),
            text=self.tokenizer.token(token_id),
            logprobs=None if params.logprobs is None else (self._logprobs(token_id, params.logprobs),),
            prompt_logprobs=[None, *(self._logprobs(i, params.prompt_logprobs or 0) for i in prompt_ids[1:])]
            if wants_prompt
            else None,
            num_cached_tokens=None if step else self.num_cached[min(sample, len(self.num_cached) - 1)],
            finish_reason=("length" if reached_limit else "stop") if is_last else None,
        )

    def _logprobs(self, token_id: int, num_top: int) -> dict[int, Logprob]:
        """The token itself is the best one, the ids after it follow."""
        ids = [token_id, *range(300, 300 + max(0, num_top - 1))]
        return {i: Logprob(-0.5 - n, n + 1, self.tokenizer.token(i)) for n, i in enumerate(ids)}

    async def check_health(self) -> None:
        if not self.healthy:
            raise EngineDeadError("rank 1 (node 10.0.0.7, pid 4242) does not answer")

    async def stats(self) -> list[RankStats]:
        return [RankStats(rank=0, scheduler={"num_running": len(self.running)}, loop={"steps": 3.0})]

    @property
    def ranks(self) -> list[RankReport]:
        return [
            RankReport(
                rank=0,
                node_ip="10.0.0.7",
                pid=4242,
                gpu_ids=(),
                device="a CPU",
                kernel_plan=("norm: cpu",),
                dispatcher="local",
                num_local_experts=32,
                weight_bytes=100,
                cache_bytes=200,
                cache_tokens=300,
                max_model_len=self.max_model_len,
                threads=1,
            )
        ]
