"""This project as one of the systems that take turns."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from moe_runtime.bench.offline import greedy
from moe_runtime.bench.turns import WARMUP_TOKENS, Turn
from moe_runtime.config import EngineConfig
from moe_runtime.errors import MoeRuntimeError
from moe_runtime.frontend import Frontend
from moe_runtime.llm import OFFLINE_STREAM_INTERVAL
from moe_runtime.request import OutputDelta


class OurSystem:
    """A deployment on Ray that lives as long as the context; between turns its ranks are parked."""

    name = "moe_runtime"

    def __init__(self, model: str, engine_args: Mapping[str, Any], model_class: str | None = None) -> None:
        """
        Raises:
            UserError, InspectionError, RankFailedError: as `Frontend.start`.
        """
        config = EngineConfig.from_kwargs(engine_args)
        self._frontend = Frontend.start(
            model, config=config, revision=None, model_class=model_class, name=None, use_tqdm=False
        )
        self._num_requests = 0
        plan = self._frontend.plan
        self.vocab_size = plan.info.vocab_size
        self.num_parameters = plan.info.num_parameters
        self.quantization = config.quantization
        self.dtype = config.dtype if config.dtype != "auto" else plan.info.dtype
        self.device = self._frontend.deployment.connection.reports[0].device

    def __enter__(self) -> OurSystem:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._frontend.close()

    @property
    def weights(self) -> str:
        """What the weights are kept in, for a reader."""
        return self.dtype if self.quantization is None else f"{self.quantization} ({self.dtype})"

    @property
    def in_float32(self) -> bool:
        """Whether tokens are comparable to those of another engine in float32."""
        return self.dtype == "float32" and self.quantization is None

    def warm_up(self, prompts: Sequence[list[int]], output_len: int) -> None:
        """A few tokens after each prompt."""
        self.generate(prompts, min(WARMUP_TOKENS, output_len))

    def generate(self, prompts: Sequence[list[int]], output_len: int) -> Turn:
        """One batch; RankFailedError if the deployment fails in it."""
        params = greedy(output_len)
        arrived: SimpleQueue[list[OutputDelta] | MoeRuntimeError] = SimpleQueue()
        began = time.perf_counter()
        tokens: dict[str, list[int]] = {}
        for prompt in prompts:
            self._num_requests += 1
            _, samples = self._frontend.make_samples(
                prompt, params, str(self._num_requests), stream_interval=OFFLINE_STREAM_INTERVAL
            )
            tokens[samples[0].request_id] = []
            self._frontend.submit(samples, arrived.put)
        num_begun = num_before = num_ended = 0
        first_token = began
        while num_ended < len(prompts):
            item = arrived.get()
            if isinstance(item, MoeRuntimeError):
                raise item
            for delta in item:
                so_far = tokens[delta.request_id]
                num_begun += not so_far and bool(delta.new_token_ids)
                so_far.extend(delta.new_token_ids)
                num_ended += delta.finish_reason is not None
            if first_token == began and num_begun == len(prompts):
                first_token = time.perf_counter()
                num_before = sum(map(len, tokens.values()))
        return Turn(
            tokens=list(tokens.values()),
            seconds=time.perf_counter() - began,
            first_token_seconds=first_token - began,
            decode_tokens=sum(map(len, tokens.values())) - num_before,
        )

    def pause(self) -> None:
        """Idle ranks park by themselves."""

    def resume(self) -> None:
        """A request wakes them."""
