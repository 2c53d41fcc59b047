"""LLM: generate text from Python, in vLLM's names."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from moe_runtime.cluster import ensure_ray
from moe_runtime.config import EngineConfig
from moe_runtime.engine import Engine
from moe_runtime.errors import ConfigError, EngineDeadError, PromptError
from moe_runtime.experts.placement import ExpertPlacement
from moe_runtime.inspection import ModelInfo, inspect_model
from moe_runtime.modelfiles import ModelFiles, resolve_model
from moe_runtime.outputs import Ledger
from moe_runtime.progress import LoadProgress, RequestProgress
from moe_runtime.rank_spec import RankReport
from moe_runtime.registry import resolve_target
from moe_runtime.request import (
    EngineRequest,
    OutputDelta,
    PromptInput,
    RequestOutput,
    SamplingParams,
    draw_seed,
    parse_prompt,
    validate_prompt,
)
from moe_runtime.tokenizer import Tokenizer, find_tokenizer
from moe_runtime.weights.index import read_index


class LLM:
    """A model served by expert-parallel ranks on Ray, until `shutdown` or the end of the `with` block."""

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        model_class: str | type | None = None,
        use_tqdm: bool = True,
        **engine_args: Any,
    ) -> None:
        """Inspect the model, reserve the ranks' resources, load the weights.

        Args:
            model: a checkpoint directory or a Hub id; None is the demo checkpoint that comes with the package.
            revision: of a Hub id.
            model_class: class of the model where no registered one is meant: `"module:Class"` or a class,
                which is shipped to the ranks by value if it was defined in the driver's script.
            use_tqdm: show a progress bar while weights load.
            engine_args: fields of `EngineConfig`, `expert_parallel_size` above all.

        Raises:
            UserError: the arguments, the checkpoint or the cluster do not allow this deployment.
            InspectionError: the model class could not be inspected.
            RankFailedError: a rank failed during start-up.
        """
        self.config = EngineConfig.from_kwargs(engine_args)
        self._engine: Engine | None = None
        self.files: ModelFiles = resolve_model(model, revision=revision)
        read_index(self.files)  # refuse broken weight files before anything is started
        target = resolve_target(self.files.config, model_class)
        self._owns_ray = ensure_ray()
        try:
            self.info: ModelInfo = inspect_model(
                self.files,
                model_class=model_class,
                expert_parallel_size=self.config.expert_parallel_size,
                dtype=self.config.dtype,
                timeout_s=self.config.inspection_timeout_s,
            )
            placement = ExpertPlacement.contiguous(self.info.num_experts, self.config.expert_parallel_size)
            self._tokenizer = find_tokenizer(self.files)
            self._eos_token_ids = self._find_eos_token_ids()
            with LoadProgress(self.files, disable=not use_tqdm) as progress:
                self._engine = Engine(
                    self.files, target, placement, self.config, on_loaded_bytes=progress.update
                )
        except BaseException:
            self.shutdown()
            raise
        self._request_numbers = itertools.count()

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue every prompt; returns the outputs in the prompts' order.

        Args:
            prompts: text, `{"prompt": text}`, `{"prompt_token_ids": [...]}`, a list of token ids, or a list
                of any of these.
            sampling_params: one for all prompts or one for each; None takes the checkpoint's defaults.

        Raises:
            PromptError: a prompt is empty, too long, or has token ids outside the vocabulary.
            RankFailedError: a rank failed; the deployment has ended.
        """
        ledger = Ledger()
        requests = self._make_requests(_as_list(prompts), sampling_params, ledger)
        with RequestProgress(ledger, disable=not use_tqdm) as progress:
            for delta in self._alive().run(requests):
                progress.update(delta, ledger.apply(delta))
        return list(ledger.outputs())

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several; messages are `{"role": ..., "content": ...}`.

        Raises:
            ConfigError: the checkpoint has no chat template.
            PromptError: the template refuses the messages.
        """
        tokenizer = self.get_tokenizer()
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [
            tokenizer.apply_chat_template(
                list(conversation),  # type: ignore[arg-type]
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        # A template writes its special tokens itself.
        token_prompts: list[PromptInput] = [
            {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}
            for text in prompts
        ]
        return self.generate(token_prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(
        self, prompt: PromptInput, sampling_params: SamplingParams | None = None
    ) -> Iterator[OutputDelta]:
        """Continue one prompt; yields pieces of output as they come."""
        yield from self._alive().run(self._make_requests([prompt], sampling_params, Ledger()))

    def get_tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            PromptError: the checkpoint has none.
        """
        if self._tokenizer is None:
            raise PromptError(
                f"the checkpoint {self.files.name} has no tokenizer; give prompts as "
                '{"prompt_token_ids": [...]}, or put its tokenizer.json beside the weights'
            )
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when it is given none: the checkpoint's `generation_config.json`."""
        return SamplingParams.from_generation_config(self.files.generation_config)

    @property
    def ranks(self) -> list[RankReport]:
        """Each rank's node, device, kernel plan, memory."""
        return self._alive().reports

    def expert_load(self) -> list[list[list[int]]]:
        """Tokens computed so far by rank, MoE layer and local expert."""
        return self._alive().expert_load()

    def shutdown(self) -> None:
        """End the ranks, and Ray if this object connected to it. Safe to call again."""
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None
        if self._owns_ray:
            import ray

            ray.shutdown()
            self._owns_ray = False

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _alive(self) -> Engine:
        if self._engine is None:
            raise EngineDeadError("this LLM was shut down; make a new one")
        return self._engine

    def _make_requests(
        self,
        prompts: Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        ledger: Ledger,
    ) -> list[EngineRequest]:
        """Check every prompt, record them, and make one EngineRequest for each sample."""
        params_of_prompt = self._params_for(len(prompts), sampling_params)
        requests: list[EngineRequest] = []
        for given, params in zip(prompts, params_of_prompt, strict=True):
            prompt = parse_prompt(given)
            token_ids = prompt.token_ids
            if token_ids is None:
                token_ids = tuple(self.get_tokenizer().encode(prompt.text or ""))
            validate_prompt(
                token_ids, self.info.vocab_size, self._alive().max_model_len, params, self._eos_token_ids
            )
            request_id = str(next(self._request_numbers))
            if params.stop and self._tokenizer is None:
                self.get_tokenizer()  # says that there is none: stop strings are found in text
            seed = params.seed if params.seed is not None else draw_seed()
            samples = [
                EngineRequest(
                    request_id=request_id,
                    sample_index=index,
                    prompt_token_ids=token_ids,
                    # Every sample has the same prompt: the first reports on it.
                    params=params if index == 0 else replace(params, prompt_logprobs=None),
                    seed=seed,
                    eos_token_ids=self._eos_token_ids,
                )
                for index in range(params.n)
            ]
            ledger.add(request_id, prompt.text, samples)
            requests.extend(samples)
        return requests

    def _params_for(
        self, num_prompts: int, sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> Sequence[SamplingParams]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            return [sampling_params] * num_prompts
        if len(sampling_params) != num_prompts:
            raise ConfigError(
                f"got {len(sampling_params)} sampling_params for {num_prompts} prompts; "
                "give one for all or one for each"
            )
        return sampling_params

    def _find_eos_token_ids(self) -> tuple[int, ...]:
        """The generation config's ids, or the model config's where it has none, and the tokenizer's own."""
        configured = self.files.generation_config.get("eos_token_id", self.files.config.get("eos_token_id"))
        ids = [] if configured is None else configured if isinstance(configured, list) else [configured]
        if self._tokenizer is not None and self._tokenizer.eos_token_id is not None:
            ids = [*ids, self._tokenizer.eos_token_id]
        return tuple(dict.fromkeys(ids))


def _as_list(prompts: PromptInput | Sequence[PromptInput]) -> Sequence[PromptInput]:
    """One prompt becomes a list of one; a list of token ids is one prompt."""
    if isinstance(prompts, str | Mapping) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]
