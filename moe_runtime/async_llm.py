"""AsyncLLM: many requests at once from asyncio, in vLLM's names."""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from moe_runtime.client import Sink
from moe_runtime.config import EngineConfig
from moe_runtime.deployment import Deployment
from moe_runtime.errors import ConfigError, MoeRuntimeError
from moe_runtime.frontend import Frontend
from moe_runtime.modelfiles import ModelFiles
from moe_runtime.observer import NoObserver, RequestObserver
from moe_runtime.outputs import Ledger
from moe_runtime.rank_spec import RankReport, RankStats
from moe_runtime.request import EngineRequest, OutputDelta, PromptInput, RequestOutput, SamplingParams
from moe_runtime.tokenizer import Tokenizer


class AsyncLLM:
    """A deployment that many coroutines use, until `shutdown` or the end of the `async with` block.

    Made by `start` or `connect`: `async with await AsyncLLM.start(...) as llm`.
    """

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._observer: RequestObserver = NoObserver()
        self._request_ids: dict[str, str] = {}  # the caller's id of each request in flight -> the ranks'
        # Checks take turns, up to 10 s each: waiting in asyncio's own threads they would keep health checks out.
        self._grammar_checks = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar-check")

    @classmethod
    async def start(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        model_class: str | type | None = None,
        name: str | None = None,
        use_tqdm: bool = False,
        **engine_args: Any,
    ) -> AsyncLLM:
        """Like `LLM(...)`, without blocking the event loop; the same arguments and errors."""
        config = EngineConfig.from_kwargs(engine_args)

        def start() -> Frontend:
            return Frontend.start(
                model,
                config=config,
                revision=revision,
                model_class=model_class,
                name=name,
                use_tqdm=use_tqdm,
            )

        return cls(await asyncio.to_thread(start))

    @classmethod
    async def connect(cls, name: str) -> AsyncLLM:
        """Attach to the running deployment named `name`; ConfigError if there is none."""
        return cls(await asyncio.to_thread(Frontend.attach, name))

    def observe(self, observer: RequestObserver) -> None:
        """Tell `observer`, and nobody else, of every request from now on."""
        self._observer = observer

    async def generate(
        self,
        prompt: PromptInput,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Continue one prompt; yields the whole output so far each time that it has grown.

        Leaving the iteration, or cancelling the task, aborts the request.

        Args:
            request_id: the caller's own name for it, for `abort`; must not be in use.
            priority: lower ones run first, where the deployment's policy is "priority".

        Raises:
            PromptError, ConfigError: the prompt or the parameters cannot be served.
            EngineDeadError, RankFailedError: the deployment has ended.
        """
        ledger = Ledger()
        async for delta in self.stream(prompt, sampling_params, request_id, priority=priority, ledger=ledger):
            ledger.apply(delta)
            (output,) = ledger.outputs()
            yield output

    async def stream(
        self,
        prompt: PromptInput,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        ledger: Ledger | None = None,
    ) -> AsyncIterator[OutputDelta]:
        """Like `generate`, but yields only what is new, once a step and sample."""
        request_id = request_id or uuid.uuid4().hex
        if request_id in self._request_ids:
            raise ConfigError(f"request_id {request_id!r} is in flight already; give each request its own")
        params = sampling_params or self._frontend.default_sampling_params
        if params.structured_outputs is not None:
            await self._check_grammar(params)
        checked, samples = self._frontend.make_samples(prompt, params, request_id, priority)
        internal_id = samples[0].request_id
        if ledger is not None:
            ledger.add(internal_id, checked.text, samples)

        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[list[OutputDelta] | MoeRuntimeError] = asyncio.Queue()

        def deliver(item: list[OutputDelta] | MoeRuntimeError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and whoever waited has gone with it
                loop.call_soon_threadsafe(arrived.put_nowait, item)

        num_open = len(samples)
        self._request_ids[request_id] = internal_id
        try:
            self._submit(samples, deliver)
            while num_open:
                item = await arrived.get()
                if isinstance(item, MoeRuntimeError):
                    num_open = 0
                    raise item
                num_open -= sum(delta.finish_reason is not None for delta in item)
                for delta in item:
                    yield delta
        finally:
            del self._request_ids[request_id]
            if num_open:
                self._frontend.client.abort(internal_id)

    async def _check_grammar(self, params: SamplingParams) -> None:
        """Raises what `check_structured_outputs` raises; a caller that leaves gives up its turn."""
        self._frontend.raise_if_closed()

        def check() -> None:
            self._frontend.raise_if_closed()  # while this waited for its turn
            self._frontend.check_structured_outputs(params)

        await asyncio.get_running_loop().run_in_executor(self._grammar_checks, check)

    def _submit(self, samples: list[EngineRequest], deliver: Sink) -> None:
        """Send a request to a rank; the observer sees what comes back before `deliver` does."""
        observer = self._observer
        request_id = samples[0].request_id

        def sink(item: list[OutputDelta] | MoeRuntimeError) -> None:
            if isinstance(item, MoeRuntimeError):
                observer.on_error(request_id)
            else:
                observer.on_deltas(item)
            deliver(item)

        observer.on_arrival(samples)
        try:
            self._frontend.submit(samples, sink)
        except MoeRuntimeError:
            observer.on_error(request_id)
            raise

    async def abort(self, request_id: str) -> None:
        """End a request; its `generate` ends with finish reason "abort". An id not in flight is ignored."""
        internal_id = self._request_ids.get(request_id)
        if internal_id is not None:
            self._frontend.client.abort(internal_id)

    async def check_health(self) -> None:
        """Raises RankFailedError or EngineDeadError unless every rank answers."""
        self._frontend.raise_if_closed()
        await asyncio.to_thread(self._frontend.deployment.check_health)

    @property
    def is_idle(self) -> bool:
        """Whether none of this driver's requests is in flight."""
        return self._frontend.client.num_in_flight == 0

    async def stats(self) -> list[RankStats]:
        """What each rank has done and holds now."""
        self._frontend.raise_if_closed()
        return await asyncio.to_thread(self._frontend.deployment.stats)

    @property
    def deployment(self) -> Deployment:
        """The deployment itself: its plan, and what can be asked of it from any thread."""
        return self._frontend.deployment

    @property
    def ranks(self) -> list[RankReport]:
        """Each rank's node, device, kernel plan, memory."""
        return list(self._frontend.deployment.connection.reports)

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer; PromptError if it has none."""
        return self._frontend.tokenizer

    @property
    def default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when it is given none: the checkpoint's `generation_config.json`."""
        return self._frontend.default_sampling_params

    @property
    def max_model_len(self) -> int:
        """Tokens that prompt and output may have together."""
        return self._frontend.deployment.connection.max_model_len

    @property
    def files(self) -> ModelFiles:
        """The checkpoint's."""
        return self._frontend.plan.files

    def on_end(self, callback: Callable[[MoeRuntimeError | None], None]) -> None:
        """Have `callback` called from another thread when the deployment ends, with the error that ended it."""
        self._frontend.deployment.on_end(callback)

    async def shutdown(self) -> None:
        """End the deployment, or leave it if it is a named one. Safe to call again."""
        await asyncio.to_thread(self._frontend.close)
        self._grammar_checks.shutdown(wait=False)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.shutdown()
