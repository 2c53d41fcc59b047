"""Frontend: what LLM and AsyncLLM share. A deployment, its model's tokenizer, requests made from prompts."""

from __future__ import annotations

import atexit
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace

from moe_runtime.client import EngineClient, Sink
from moe_runtime.cluster import resolve_device
from moe_runtime.config import EngineConfig
from moe_runtime.connecting import ensure_ray
from moe_runtime.deployment import DRIVER, Deployment, OwnedDeployment, Plan
from moe_runtime.errors import ConfigError, EngineDeadError, MoeRuntimeError, PromptError
from moe_runtime.grammar.checker import GrammarChecker
from moe_runtime.inspection import inspect_model
from moe_runtime.modelfiles import resolve_model
from moe_runtime.named import NamedDeployment
from moe_runtime.progress import StartUpProgress
from moe_runtime.quantization import check_device, find_quantization
from moe_runtime.registry import resolve_target
from moe_runtime.request import (
    EngineRequest,
    Prompt,
    PromptInput,
    SamplingParams,
    draw_seed,
    parse_prompt,
    validate_prompt,
)
from moe_runtime.tokenizer import Tokenizer, find_eos_token_ids, find_tokenizer
from moe_runtime.weights.index import read_index


class Frontend:
    """A driver's hold on a deployment, from start or attachment to `close`."""

    def __init__(self, deployment: Deployment, owns_ray: bool) -> None:
        self.deployment = deployment
        self.plan = deployment.plan
        self._owns_ray = owns_ray
        self._tokenizer = find_tokenizer(self.plan.files)
        self._eos_token_ids = find_eos_token_ids(self.plan.files, self._tokenizer)
        self._grammar_checker = GrammarChecker(
            self.plan.files, self.plan.info.vocab_size, self._eos_token_ids
        )
        self._id_prefix = uuid.uuid4().hex[:12]  # tells this driver's requests from those of others
        self._closed = False
        connection = deployment.connection
        self.client = EngineClient(connection.addresses, connection.key, self.plan.config.block_size)
        deployment.on_end(self._ended)
        atexit.register(self.close)  # before Ray's own end, which the threads of an open one would meet

    @classmethod
    def start(
        cls,
        model: str | os.PathLike[str] | None,
        *,
        config: EngineConfig,
        revision: str | None,
        model_class: str | type | None,
        name: str | None,
        use_tqdm: bool,
        keeper: str | None = None,
    ) -> Frontend:
        """Inspect the model, reserve the ranks' resources, load the weights, connect.

        Args:
            keeper: who ends a named deployment (`Plan.keeper`).

        Raises:
            UserError: the arguments, the checkpoint or the cluster do not allow this deployment.
            InspectionError: the model class could not be inspected.
            RankFailedError: a rank failed during start-up.
        """
        files = resolve_model(model, revision=revision)
        read_index(files)  # refuse broken weight files before anything is started
        target = resolve_target(files.config, model_class)
        quantization = find_quantization(files.config, config.quantization)
        owns_ray = ensure_ray(must_outlive_us=name is not None and keeper != DRIVER)
        try:
            device = resolve_device(config.device, config.placement_timeout_s)
            check_device(quantization, device)
            info = inspect_model(
                files,
                model_class=model_class,
                expert_parallel_size=config.expert_parallel_size,
                dtype=config.dtype,
                quantization=config.quantization,
                device=device,
                timeout_s=config.inspection_timeout_s,
            )
            plan = Plan(files=files, target=target, info=info, config=config, name=name, keeper=keeper)
            with StartUpProgress(files, disable=not use_tqdm) as progress:
                deployment: Deployment = (
                    OwnedDeployment(plan, progress.update)
                    if name is None
                    else NamedDeployment.start(name, plan, progress.update)
                )
            return cls._connected(deployment, owns_ray)
        except BaseException:
            _leave_ray(owns_ray)
            raise

    @classmethod
    def attach(cls, name: str) -> Frontend:
        """Connect to the running deployment named `name`.

        Raises:
            ConfigError: there is none of that name.
        """
        owns_ray = ensure_ray(must_outlive_us=True)
        try:
            return cls._connected(NamedDeployment.attach(name), owns_ray)
        except BaseException:
            _leave_ray(owns_ray)
            raise

    @classmethod
    def _connected(cls, deployment: Deployment, owns_ray: bool) -> Frontend:
        try:
            return cls(deployment, owns_ray)
        except BaseException:
            deployment.release()
            raise

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer; PromptError if it has none."""
        if self._tokenizer is None:
            raise PromptError(
                f"the checkpoint {self.plan.files.name} has no tokenizer; give prompts as "
                '{"prompt_token_ids": [...]}, or put its tokenizer.json beside the weights'
            )
        return self._tokenizer

    @property
    def default_sampling_params(self) -> SamplingParams:
        """The checkpoint's own, from its `generation_config.json`."""
        return SamplingParams.from_generation_config(self.plan.files.generation_config)

    def make_samples(
        self,
        prompt_input: PromptInput,
        params: SamplingParams,
        request_id: str,
        priority: int = 0,
        stream_interval: int = 1,
    ) -> tuple[Prompt, list[EngineRequest]]:
        """Check a prompt and make one EngineRequest for each of its `n` samples.

        Args:
            stream_interval: tokens that come together, after the first: fewer messages where nobody reads along.

        Raises:
            PromptError: it is empty, too long, or has token ids outside the vocabulary.
            ConfigError: the parameters cannot be served.
        """
        arrived = time.monotonic()
        self.raise_if_closed()
        prompt = parse_prompt(prompt_input)
        token_ids = prompt.token_ids
        if token_ids is None:
            token_ids = tuple(self.tokenizer.encode(prompt.text or ""))
        max_model_len = self.deployment.connection.max_model_len
        validate_prompt(token_ids, self.plan.info.vocab_size, max_model_len, params, self._eos_token_ids)
        if params.stop:
            _ = self.tokenizer  # stop strings are found in text
        self.check_structured_outputs(params)
        seed = params.seed if params.seed is not None else draw_seed()
        samples = [
            EngineRequest(
                request_id=f"{self._id_prefix}-{request_id}",
                sample_index=index,
                prompt_token_ids=token_ids,
                # Every sample has the same prompt: the first reports on it.
                params=params if index == 0 else replace(params, prompt_logprobs=None),
                seed=seed,
                eos_token_ids=self._eos_token_ids,
                arrival_time=arrived,
                priority=priority,
                stream_interval=stream_interval,
            )
            for index in range(params.n)
        ]
        return Prompt(prompt.text, token_ids), samples

    def check_structured_outputs(self, params: SamplingParams) -> None:
        """Compile a structured request's grammar, aside and within limits, unless it is known already.

        The first one takes seconds, others up to the limit of a few: an event loop calls it from a thread,
        and `make_samples` then finds the answer.

        Raises:
            ConfigError: naming structured_outputs, and why it cannot be served.
        """
        if params.structured_outputs is None:
            return
        if self._tokenizer is None:
            raise ConfigError(
                f"structured_outputs needs a tokenizer, and the checkpoint {self.plan.files.name} has none; put "
                "its tokenizer.json beside the weights"
            )
        if not self._eos_token_ids and not params.stop_token_ids:
            raise ConfigError(
                "structured_outputs needs a token that ends the text: the checkpoint names no eos_token_id; give "
                "stop_token_ids"
            )
        self._grammar_checker.check(params.structured_outputs)

    def submit(self, samples: Sequence[EngineRequest], sink: Sink) -> None:
        """Send one request's samples to a rank; EngineDeadError if the deployment has ended."""
        self.client.submit(samples, sink)

    def raise_if_closed(self) -> None:
        """EngineDeadError after `close`."""
        if self._closed:
            raise EngineDeadError("this LLM was shut down; make a new one")

    def close(self) -> None:
        """Abort what is in flight, end the deployment if it is this driver's own. Safe to call again."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._grammar_checker.close()
        self.client.close()
        self.deployment.release()
        _leave_ray(self._owns_ray)

    def _ended(self, error: MoeRuntimeError | None) -> None:
        self.client.fail(error or EngineDeadError("the deployment was shut down"))


def _leave_ray(owned: bool) -> None:
    if owned:
        import ray

        ray.shutdown()
