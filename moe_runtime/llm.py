"""LLM: generate text from Python, in vLLM's names."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from moe_runtime.config import EngineConfig
from moe_runtime.errors import ConfigError, MoeRuntimeError
from moe_runtime.frontend import Frontend
from moe_runtime.inspection import ModelInfo
from moe_runtime.outputs import Ledger
from moe_runtime.progress import RequestProgress
from moe_runtime.rank_spec import RankReport, RankStats
from moe_runtime.request import OutputDelta, PromptInput, RequestOutput, SamplingParams
from moe_runtime.tokenizer import Tokenizer

# Tokens that come together where nobody reads along: each message wakes this process, on cores that ranks compute with.
OFFLINE_STREAM_INTERVAL = 16


class LLM:
    """A model served by expert-parallel ranks on Ray, until `shutdown` or the end of the `with` block."""

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        model_class: str | type | None = None,
        name: str | None = None,
        use_tqdm: bool = True,
        **engine_args: Any,
    ) -> None:
        """Inspect the model, reserve the ranks' resources, load the weights.

        Args:
            model: a checkpoint directory or a Hub id; None is the demo checkpoint that comes with the package.
            revision: of a Hub id.
            model_class: class of the model where no registered one is meant: `"module:Class"` or a class,
                which is shipped to the ranks by value if it was defined in the driver's script.
            name: of the deployment, which then outlives this object and is shared: other drivers attach with
                `LLM.connect(name)`, and `moe-runtime stop NAME` ends it.
            use_tqdm: show a progress bar while weights load.
            engine_args: fields of `EngineConfig`, `expert_parallel_size` above all.

        Raises:
            UserError: the arguments, the checkpoint or the cluster do not allow this deployment.
            InspectionError: the model class could not be inspected.
            RankFailedError: a rank failed during start-up.
        """
        self._use(
            Frontend.start(
                model,
                config=EngineConfig.from_kwargs(engine_args),
                revision=revision,
                model_class=model_class,
                name=name,
                use_tqdm=use_tqdm,
            )
        )

    @classmethod
    def connect(cls, name: str) -> LLM:
        """Attach to the running deployment named `name`.

        Raises:
            ConfigError: there is none of that name.
        """
        llm = cls.__new__(cls)
        llm._use(Frontend.attach(name))
        return llm

    def _use(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self.files = frontend.plan.files
        self.config = frontend.plan.config
        self.info: ModelInfo = frontend.plan.info
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
        pieces = self._run(_as_list(prompts), sampling_params, ledger, OFFLINE_STREAM_INTERVAL)
        with RequestProgress(disable=not use_tqdm) as progress:
            for delta in pieces:
                progress.update(len(ledger), delta, ledger.apply(delta))
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
        texts = [
            tokenizer.apply_chat_template(
                list(conversation),  # type: ignore[arg-type]
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        # A template writes its special tokens itself.
        prompts: list[PromptInput] = [
            {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}
            for text in texts
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[OutputDelta]:
        """Continue one prompt or several; yields pieces of output as they come. Leaving the loop aborts the rest.

        Pieces of several prompts come mixed; `request_id` tells them apart. Arguments and errors are those of
        `generate`.
        """
        yield from self._run(_as_list(prompts), sampling_params, Ledger(), stream_interval=1)

    def get_tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            PromptError: the checkpoint has none.
        """
        return self._frontend.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when it is given none: the checkpoint's `generation_config.json`."""
        return self._frontend.default_sampling_params

    @property
    def ranks(self) -> list[RankReport]:
        """Each rank's node, device, kernel plan, memory."""
        return list(self._frontend.deployment.connection.reports)

    @property
    def stats(self) -> list[RankStats]:
        """What each rank has done and holds now."""
        self._frontend.raise_if_closed()
        return self._frontend.deployment.stats()

    def expert_load(self) -> list[list[list[int]]]:
        """Tokens computed so far by rank, MoE layer and local expert."""
        self._frontend.raise_if_closed()
        return self._frontend.deployment.expert_load()

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        """Results of a method of each rank's worker, run beside its steps, in rank order."""
        self._frontend.raise_if_closed()
        return self._frontend.deployment.collective_rpc(method, *args)

    def shutdown(self) -> None:
        """End the deployment, or leave it if it is a named one. Safe to call again."""
        self._frontend.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _run(
        self,
        prompts: Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        ledger: Ledger,
        stream_interval: int,
    ) -> Iterator[OutputDelta]:
        """Check every prompt, record and submit them; yields pieces until all have ended."""
        frontend = self._frontend
        frontend.raise_if_closed()
        params_of_prompt = self._params_for(len(prompts), sampling_params)
        made = [
            frontend.make_samples(
                prompt, params, str(next(self._request_numbers)), stream_interval=stream_interval
            )
            for prompt, params in zip(prompts, params_of_prompt, strict=True)
        ]
        arrived: SimpleQueue[list[OutputDelta] | MoeRuntimeError] = SimpleQueue()
        open_ids: set[str] = set()
        try:
            for prompt, samples in made:
                ledger.add(samples[0].request_id, prompt.text, samples)
                open_ids.add(samples[0].request_id)
                frontend.submit(samples, arrived.put)
            yield from _until_all_ended(arrived, open_ids, {s[0].request_id: len(s) for _, s in made})
        finally:  # the caller left, or an error ended the batch: nobody waits for the rest
            for request_id in open_ids:
                frontend.client.abort(request_id)

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


def _until_all_ended(
    arrived: SimpleQueue[list[OutputDelta] | MoeRuntimeError],
    open_ids: set[str],
    open_samples: dict[str, int],
) -> Iterator[OutputDelta]:
    """Pieces as they arrive; takes each request out of `open_ids` when its last sample has ended."""
    while open_ids:
        item = arrived.get()
        if isinstance(item, MoeRuntimeError):
            raise item
        for delta in item:
            if delta.finish_reason is not None:
                open_samples[delta.request_id] -= 1
                if not open_samples[delta.request_id]:
                    open_ids.discard(delta.request_id)
            yield delta


def _as_list(prompts: PromptInput | Sequence[PromptInput]) -> Sequence[PromptInput]:
    """One prompt becomes a list of one; a list of token ids is one prompt."""
    if isinstance(prompts, str | Mapping) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]
