"""Published figures of whole deployments, the settings behind them, and what has to be assumed to predict them.

None of these numbers enters a constant. One of them may calibrate: see `validate`.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_runtime.simulate.deployment import Deployment
from moe_runtime.simulate.dispatch import DispatchPlan
from moe_runtime.simulate.hardware import GPUS
from moe_runtime.simulate.models import deepseek_v3
from moe_runtime.simulate.routing import Layout, ZipfRouting
from moe_runtime.simulate.step import Step

_SGLANG = "lmsys.org/blog/2025-05-05-large-scale-ep"
_VLLM = "blog.vllm.ai/2025/12/17/large-scale-serving, charts in llm-d.ai/blog/llm-d-v0.3"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedFigure:
    """One figure. All are of DeepSeek-V3 or R1 in fp8, eight GPUs a node and one 400 Gb/s card for each."""

    name: str
    source: str
    tokens_per_s: float  # of one GPU: output tokens of a decode, input tokens of a prefill
    gpu: str
    expert_parallel_size: int
    num_redundant: int
    step: Step
    overlap: bool
    perfect_balance: bool
    assumptions: str  # what the source does not say, or is simplified here
    calibrates: bool = False

    def deployment(self, time_factor: float = 1.0) -> Deployment:
        """What is simulated for it."""
        model = deepseek_v3()
        return Deployment(
            model=model,
            hardware=GPUS[self.gpu],
            layout=Layout(
                num_ranks=self.expert_parallel_size, ranks_per_node=8, num_redundant=self.num_redundant
            ),
            routing=ZipfRouting(model.num_experts, model.top_k),
            dispatch=DispatchPlan(kind="deepep_normal" if self.step.is_prefill else "deepep_low_latency"),
            overlap=self.overlap,
            perfect_balance=self.perfect_balance,
            time_factor=time_factor,
        )


def _sglang_decode(
    name: str, per_node: float, *, overlap: bool, derived: str = "", calibrates: bool = False
) -> PublishedFigure:
    return PublishedFigure(
        name=name,
        source=_SGLANG,
        tokens_per_s=per_node / 8,
        gpu="H100",
        expert_parallel_size=72,
        num_redundant=32,
        step=Step(tokens=256, context=2000),
        overlap=overlap,
        perfect_balance=False,
        assumptions=derived
        + "uniform choices stand for experts balanced by EPLB on the same data; bfloat16 cache",
        calibrates=calibrates,
    )


def _prefill(
    name: str,
    source: str,
    per_node: float,
    prompt: int,
    *,
    gpu: str = "H100",
    perfect: bool = False,
    redundant: int = 32,
) -> PublishedFigure:
    return PublishedFigure(
        name=name,
        source=source,
        tokens_per_s=per_node / 8,
        gpu=gpu,
        expert_parallel_size=32,
        num_redundant=redundant,
        step=Step(tokens=16_384, context=prompt, is_prefill=True),
        overlap=True,
        perfect_balance=perfect,
        assumptions="no group-limited routing: a token may go to all 4 nodes"
        + ("" if perfect else "; uniform choices stand for EPLB's balance, which the source calls imperfect"),
    )


def _vllm_name(ep: int) -> str:
    return f"vLLM decode, H200, EP{ep}, batch 256"


def _vllm_decode(ep: int, tokens_per_s: float, redundant: int, read_off: str) -> PublishedFigure:
    return PublishedFigure(
        name=_vllm_name(ep),
        source=_VLLM,
        tokens_per_s=tokens_per_s,
        gpu="H200",
        expert_parallel_size=ep,
        num_redundant=redundant,
        step=Step(tokens=256, context=3000),
        overlap=True,
        perfect_balance=False,
        assumptions=f"{read_off}; 2,000 tokens in and 2,000 out, so 3,000 cached on average; all 256 "
        "requests decode all the time; uniform choices",
    )


_DECODE, _DECODE_PLAIN = "SGLang decode, H100, EP72, batch 256", "the same without two-batch overlap"
_PREFILL_1K, _PREFILL_4K = "SGLang prefill, H100, EP32, prompts of 1K", "SGLang prefill, prompts of 4K"

FIGURES: tuple[PublishedFigure, ...] = (
    _sglang_decode(_DECODE, 22_282, overlap=True, calibrates=True),
    _sglang_decode(
        _DECODE_PLAIN,
        22_310 / 1.255,
        overlap=False,
        derived="derived: the source gives 22,310 tokens/s a node with overlap and a speedup of 25.5%, so "
        "22,310 / 1.255; ",
    ),
    _prefill(_PREFILL_1K, _SGLANG, 57_674, 1024),
    _prefill("SGLang prefill, prompts of 2K (headline)", _SGLANG, 52_300, 2000),
    _prefill(_PREFILL_4K, _SGLANG, 50_302, 4096),
    _prefill("the same, simulated perfect EPLB", _SGLANG, 59_337, 4096, perfect=True),
    _prefill(
        "DeepSeek's profile, H800, EP32, prompts of 4K",
        _SGLANG,
        62_713,
        4096,
        gpu="H800",
        perfect=True,
        redundant=0,
    ),
    _vllm_decode(32, 2200, 0, "the headline's 2.2k tokens/s a GPU is the chart's bar at EP 32"),
    _vllm_decode(72, 2070, 32, "read off a bar chart, good to 1%"),
    _vllm_decode(96, 1970, 32, "read off a bar chart, good to 1%"),
)

# What is compared, and the figures whose ratio it is.
TRENDS: tuple[tuple[str, str, str], ...] = (
    ("two-batch overlap, SGLang decode", _DECODE, _DECODE_PLAIN),
    ("prompts of 4K by 1K, SGLang prefill", _PREFILL_4K, _PREFILL_1K),
    ("EP 72 by EP 32, vLLM decode", _vllm_name(72), _vllm_name(32)),
    ("EP 96 by EP 32, vLLM decode", _vllm_name(96), _vllm_name(32)),
)
