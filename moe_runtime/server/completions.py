"""/v1/completions: prompts in, continuations out, whole or streamed."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Iterable
from typing import Self

from fastapi import Request, Response

from moe_runtime.request import OutputDelta
from moe_runtime.server.errors import bad_request
from moe_runtime.server.generation import Generation, Job
from moe_runtime.server.http import DONE, EventStream, event, json_answer, read_json, while_connected
from moe_runtime.server.logprobs import completion_logprobs, joined, prompt_columns, prompt_logprobs
from moe_runtime.server.prompts import encode as encode_text
from moe_runtime.server.prompts import room_for_output, served_name
from moe_runtime.server.protocol.answers import Usage, encode
from moe_runtime.server.protocol.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from moe_runtime.server.protocol.sampling import check_logprobs
from moe_runtime.server.state import ServerState
from moe_runtime.server.structured import structure_params

ROUTE = "/v1/completions"
_DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def create_completion(http: Request) -> Response:
    """The handler."""
    state: ServerState = http.app.state.server
    request = CompletionRequest.parse(await read_json(http, state.config.body_timeout_s))
    answer = await while_connected(http.receive, _CompletionAnswer.prepare(state, request, http))
    if not request.stream:
        return json_answer(await while_connected(http.receive, answer.whole()))
    chunks = answer.chunks()
    first = await while_connected(http.receive, anext(chunks))
    return EventStream(first, chunks, request_id=http.state.id, send_timeout_s=state.config.send_timeout_s)


class _CompletionAnswer:
    """One request on its way to an answer."""

    def __init__(
        self, state: ServerState, request: CompletionRequest, jobs: list[Job], http: Request
    ) -> None:
        self._request = request
        self._jobs = jobs
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = served_name(request.model, state.config)
        self._tokenizer = state.engine.tokenizer if request.echo else None
        self._generation = Generation(
            state,
            jobs,
            request_id=self._id,
            arrival_time=http.state.arrival_time,
            priority=request.priority or 0,
        )
        self._offsets: dict[int, int] = {}  # of choices that have begun: characters of their text so far
        self._num_generated = 0

    @classmethod
    async def prepare(cls, state: ServerState, request: CompletionRequest, http: Request) -> Self:
        """Check everything that can be checked here; raises ApiError and UserError."""
        served_name(request.model, state.config)
        _check(state, request)
        return cls(state, request, await _make_jobs(state, request), http)

    async def whole(self) -> Completion:
        """Wait for every choice."""
        async with self._generation:
            outputs = await self._generation.whole()
        self._count(outputs.values())
        choices = [self._choice(job, delta) for (job, _), delta in outputs.items()]
        return self._completion(choices, self._usage())

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Events: all that a step has brought at once, at the end perhaps the usage, and the mark of the end."""
        options = self._request.stream_options
        wants_usage = options is not None and bool(options.include_usage)
        continuous = options is not None and bool(options.continuous_usage_stats)
        async with self._generation:
            while batch := await self._generation.next_batch():
                self._count(delta for _, delta in batch)
                choices = [self._choice(job, delta) for job, delta in batch if self._is_news(delta)]
                events = []
                for choice in choices:
                    chunk = self._completion([choice])
                    if continuous:
                        chunk.usage = self._usage()
                    elif wants_usage:
                        chunk.usage = None
                    events.append(event(encode(chunk)))
                if events:
                    yield b"".join(events)
        if wants_usage:
            yield event(encode(self._completion([], self._usage())))
        yield DONE

    def _count(self, deltas: Iterable[OutputDelta]) -> None:
        if self._request.max_tokens != 0:
            self._num_generated += sum(len(delta.new_token_ids) for delta in deltas)

    def _is_news(self, delta: OutputDelta) -> bool:
        """Whether a piece has something to tell: a token in the middle of a character has not, unless asked."""
        request = self._request
        if delta.text or delta.finish_reason is not None or request.echo:
            return True
        return bool(delta.new_token_ids) and (request.logprobs is not None or bool(request.return_token_ids))

    def _choice(self, job_index: int, delta: OutputDelta) -> CompletionChoice:
        """A piece of a choice, or all of it."""
        request, job = self._request, self._jobs[job_index]
        index = job_index * request.num_choices + delta.sample_index
        is_first = index not in self._offsets
        if request.max_tokens == 0:  # one token had to be generated, and nobody wants it
            delta = _without_tokens(delta)
        echoed = self._echoed_text(job) if request.echo and is_first else ""
        offset = self._offsets.get(index, len(echoed))
        self._offsets[index] = offset + len(delta.text)
        choice = CompletionChoice(
            index=index,
            text=echoed + delta.text,
            logprobs=self._logprobs(job, delta, offset, is_first),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )
        if request.prompt_logprobs is not None and delta.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(delta.prompt_logprobs)
        if request.return_token_ids:
            choice.token_ids = list(delta.new_token_ids)
            if is_first:
                choice.prompt_token_ids = job.token_ids
        return choice

    def _logprobs(
        self, job: Job, delta: OutputDelta, offset: int, is_first: bool
    ) -> CompletionLogprobs | None:
        if self._request.logprobs is None:
            return None
        generated = completion_logprobs(delta.new_token_ids, delta.logprobs or (), offset)
        if self._tokenizer is None or not is_first or delta.prompt_logprobs is None:
            return generated
        return joined(prompt_columns(self._tokenizer, job.token_ids, delta.prompt_logprobs), generated)

    def _echoed_text(self, job: Job) -> str:
        if job.text is not None or self._tokenizer is None:
            return job.text or ""
        return self._tokenizer.decode(job.token_ids, skip_special_tokens=False)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        completion = Completion(id=self._id, created=self._created, model=self._model, choices=choices)
        if usage is not None:
            completion.usage = usage
        return completion

    def _usage(self) -> Usage:
        num_prompt = sum(len(job.token_ids) for job in self._jobs)
        return Usage.of(num_prompt, self._num_generated, self._generation.num_cached_tokens)


def _check(state: ServerState, request: CompletionRequest) -> None:
    config = state.config
    request.check_limits(config)
    check_logprobs("logprobs", request.logprobs, config)
    if len(request.prompt) > config.max_prompts:
        raise bad_request(
            f"prompt must hold at most {config.max_prompts} prompts, got {len(request.prompt)}", "prompt"
        )
    if request.max_tokens == 0 and not request.echo:
        raise bad_request("max_tokens must be at least 1, got 0; only with echo may it be 0", "max_tokens")
    if request.echo and request.logprobs is not None and request.num_choices > 1:
        raise bad_request("echo with logprobs needs n to be 1: the prompt's logprobs are given once", "n")


async def _make_jobs(state: ServerState, request: CompletionRequest) -> list[Job]:
    engine = state.engine
    overrides = structure_params(request)
    if request.logprobs is not None:
        overrides["logprobs"] = request.logprobs
        if request.echo and request.prompt_logprobs is None:
            overrides["prompt_logprobs"] = request.logprobs
    max_tokens = 1 if request.max_tokens == 0 else request.max_tokens
    default = max(_DEFAULT_MAX_TOKENS, request.min_tokens or 0)
    # All values but the room for the output, which each prompt has its own of.
    params = request.sampling_params(
        engine.default_sampling_params,
        **overrides,
        max_tokens=default if max_tokens is None else max_tokens,
    )
    add_special_tokens = request.add_special_tokens is not False
    jobs = []
    for prompt in request.prompt:
        text = prompt if isinstance(prompt, str) else None
        token_ids = (
            prompt
            if isinstance(prompt, list)
            else await encode_text(
                engine.tokenizer,
                prompt,
                add_special_tokens=add_special_tokens,
                max_model_len=engine.max_model_len,
            )
        )
        room = room_for_output(
            len(token_ids), max_tokens, engine.max_model_len, default=default, param="prompt"
        )
        jobs.append(Job(text=text, token_ids=token_ids, params=dataclasses.replace(params, max_tokens=room)))
    return jobs


def _without_tokens(delta: OutputDelta) -> OutputDelta:
    return OutputDelta(
        request_id=delta.request_id,
        sample_index=delta.sample_index,
        logprobs=None if delta.logprobs is None else (),
        prompt_logprobs=delta.prompt_logprobs,
        finish_reason=delta.finish_reason,
        stop_reason=delta.stop_reason,
    )
