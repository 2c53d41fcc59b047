"""vLLM's offline API without vLLM; a test copies this file to a folder on Python's path, as vllm.py.

Names, kinds and defaults are those in vLLM 0.32's wheel: `LLM`, `EngineArgs` (where LLM's further arguments go),
`generate`, `SamplingParams`, `RequestOutput`. Each has only some of the real one's parameters, so this refuses whatever
vLLM would refuse. A request's tokens are its prompt's first number and the numbers after it; its first token takes a
quarter of a second longer than that of the request before it.
"""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass, field
from typing import Any

__version__ = "0.32.0"


@dataclass(kw_only=True)
class EngineArgs:
    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1
    enable_expert_parallel: bool = False
    dtype: str = "auto"
    load_format: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enable_chunked_prefill: bool | None = None
    enable_prefix_caching: bool | None = None
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    block_size: int | None = None
    enforce_eager: bool = False
    disable_log_stats: bool = False


class LLM:
    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        enforce_eager: bool = False,
        kv_cache_memory_bytes: int | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("disable_log_stats", True)
        self._args = EngineArgs(
            model=model,
            tokenizer=tokenizer,
            skip_tokenizer_init=skip_tokenizer_init,
            trust_remote_code=trust_remote_code,
            tensor_parallel_size=tensor_parallel_size,
            dtype=dtype,
            seed=seed,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=enforce_eager,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            **kwargs,
        )
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") != "0":
            raise RuntimeError("the engine is in a process of its own")
        if os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto") != "nobind":
            raise RuntimeError("threads are bound to cores")
        if not int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "0")):
            raise RuntimeError("most of the machine's memory is not free")

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: Any = None,
        priority: Any = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        params = sampling_params or SamplingParams()
        if self._args.skip_tokenizer_init and params.detokenize:
            raise ValueError("there is no tokenizer to detokenize with")
        return [self._output(number, prompt, params) for number, prompt in enumerate(prompts)]

    def _output(self, number: int, prompt: dict[str, list[int]], params: SamplingParams) -> RequestOutput:
        ids, limit = prompt["prompt_token_ids"], self._args.max_model_len
        length = params.max_tokens if params.ignore_eos else 1  # any token may be the end
        if limit is not None and len(ids) + length > limit:
            raise ValueError(f"{len(ids)} tokens and {length} more are over the model's length, {limit}")
        metrics = None if self._args.disable_log_stats else RequestStateStats(0.25 * (number + 1))
        tokens = array("q", range(ids[0], ids[0] + length))
        return RequestOutput(str(number), ids, [CompletionOutput(0, "", tokens)], True, metrics)


@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int = 16
    min_tokens: int = 0
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if self.temperature != 0:
            raise ValueError("tokens are drawn, not the likeliest")


@dataclass
class RequestStateStats:
    first_token_latency: float = 0.0


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: array[int]


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True
    metrics: RequestStateStats | None = None
