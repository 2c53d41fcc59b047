"""Steps: the time of one decode or prefill step of all ranks together, divided into parts.

Ranks compute, exchange and wait for the fullest one in every MoE layer. With overlap, a step is two half batches that
take turns: a layer takes as long as the slowest of (both computations), (one computation and its exchange), and (both
exchanges), since each half has to exchange before it goes on.

Shape legend: T tokens of a rank, R ranks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from moe_runtime.simulate import costs
from moe_runtime.simulate.deployment import Deployment
from moe_runtime.simulate.dispatch import exchange_seconds
from moe_runtime.simulate.routing import LayerLoad

PARTS = ("attention", "experts", "dispatch", "combine", "waiting", "other")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What every rank does in one step."""

    tokens: int  # new tokens of each rank
    context: float  # decode: tokens cached for each sequence; prefill: tokens of a prompt
    is_prefill: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of a step; the parts sum to it."""

    attention: float  # projections, attention or recurrence, and their norms
    experts: float  # router, routed and shared experts, dense MLPs, at the mean load
    dispatch: float  # what computation does not hide
    combine: float
    waiting: float  # for the fullest rank
    other: float  # embedding, LM head, sampling, scheduling
    imbalance: float  # rows of the fullest rank by the mean

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def split(self) -> dict[str, float]:
        """Share of each part in the step."""
        return {part: getattr(self, part) / self.total for part in PARTS}


def step_time(deployment: Deployment, step: Step) -> StepTime:
    """Seconds of one step.

    A step of one token cannot be halved: with overlap it is as without.
    """
    if deployment.overlap and step.tokens > 1 and deployment.layout.num_ranks > 1:
        time = _overlapped(deployment, step)
    else:
        time = _parts(deployment, step, step.tokens)
    scaled = {name: value * deployment.time_factor for name, value in asdict(time).items()}
    return StepTime(**{**scaled, "imbalance": time.imbalance})


def _parts(deployment: Deployment, step: Step, tokens: float) -> StepTime:
    """Seconds with `tokens` tokens a rank and no overlap."""
    model, hardware = deployment.model, deployment.hardware
    total_tokens = max(1, round(tokens * deployment.layout.num_ranks))
    loads = deployment.routing.loads(deployment.layout, total_tokens)
    if deployment.perfect_balance:
        loads = [load.balanced() for load in loads]
    layers = [_moe_layer(deployment, load, tokens) for load in loads]
    mean = {name: float(np.mean([getattr(layer, name) for layer in layers])) for name in PARTS}
    dense = model.num_dense_layers * costs.gated_mlp_seconds(
        hardware, model, tokens, model.dense_intermediate
    )
    moe = model.num_moe_layers
    return StepTime(
        attention=_attention(deployment, step, tokens),
        experts=moe * mean["experts"] + dense,
        dispatch=moe * mean["dispatch"],
        combine=moe * mean["combine"],
        waiting=moe * mean["waiting"],
        other=_other(deployment, step, tokens),
        imbalance=float(np.mean([load.imbalance for load in loads])),
    )


def _attention(deployment: Deployment, step: Step, tokens: float) -> float:
    model, hardware = deployment.model, deployment.hardware
    seconds = costs.prefill_mixer_seconds if step.is_prefill else costs.decode_mixer_seconds
    return sum(m.count * seconds(hardware, model, m, tokens, step.context) for m in model.mixers)


def _other(deployment: Deployment, step: Step, tokens: float) -> float:
    """A prefill asks the LM head about the last token of each prompt only."""
    rows = tokens / step.context if step.is_prefill else tokens
    hardware, model = deployment.hardware, deployment.model
    embedding = costs.small_kernels_seconds(hardware, model, tokens, 2)  # and the last norm
    return embedding + costs.head_seconds(hardware, model, rows) + hardware.efficiency.step_s


def _moe_layer(deployment: Deployment, load: LayerLoad, tokens: float) -> StepTime:
    """Seconds of one MoE layer without its attention."""
    model, hardware = deployment.model, deployment.hardware
    routed_R = _routed(deployment, load)
    exchange = exchange_seconds(
        hardware, deployment.dispatch, deployment.layout, load, tokens, model.hidden_size, model.top_k
    )
    router = costs.linear_seconds(hardware, tokens, model.hidden_size, model.num_experts, 2)
    # Norm, top-k, sorting of rows, sum of the experts' results.
    small = costs.small_kernels_seconds(hardware, model, tokens, 4)
    shared = costs.gated_mlp_seconds(hardware, model, tokens, model.shared_intermediate)
    mean = float(routed_R.mean())
    return StepTime(
        attention=0.0,
        experts=router + small + shared + mean,
        dispatch=exchange.dispatch,
        combine=exchange.combine,
        waiting=float(routed_R.max()) - mean + exchange.waiting,
        other=0.0,
        imbalance=load.imbalance,
    )


def _routed(deployment: Deployment, load: LayerLoad) -> np.ndarray:
    """Seconds of the routed experts on each rank, [R]: measured where they were, else the roofline."""
    model = deployment.model
    measured = deployment.measured.seconds(
        model.hidden_size,
        model.moe_intermediate,
        deployment.experts_per_rank,
        model.expert_bytes,
        load.rows_R,
    )
    if measured is not None:
        return measured
    return costs.routed_seconds(deployment.hardware, model, load.rows_R, load.touched_R)


def _overlapped(deployment: Deployment, step: Step) -> StepTime:
    """Two half batches in turns; exchanges are what is left of a layer after its computations."""
    half = _parts(deployment, step, step.tokens / 2)
    layers = deployment.model.num_moe_layers
    compute = (half.attention + half.experts + half.waiting) / layers
    exchange = (half.dispatch + half.combine) / layers
    # An exchange that runs on the device's own multiprocessors takes them from the computation beside it.
    taken = deployment.hardware.efficiency.comm_sms if deployment.dispatch.occupies_device else 0.0
    slowed = compute + taken / (1 - taken) * min(compute, exchange)
    layer = max(2 * slowed, slowed + exchange, 2 * exchange)
    scale = slowed / compute
    exposed = layer - 2 * slowed
    share = half.dispatch / (half.dispatch + half.combine) if exchange else 0.0
    whole = _other(deployment, step, step.tokens)
    return StepTime(
        attention=2 * half.attention * scale,
        experts=2 * half.experts * scale,
        dispatch=layers * exposed * share,
        combine=layers * exposed * (1 - share),
        waiting=2 * half.waiting * scale,
        other=whole,
        imbalance=half.imbalance,
    )
