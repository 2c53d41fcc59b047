"""Costs: seconds of the kernels of one layer on one device.

Every product is a smooth roofline: t = kernel_s + (compute^p + memory^p)^(1/p) + output / bandwidth, where the output
is written after the last multiplication. The constants are those of `efficiency`.

Shape legend: T tokens of a rank, H hidden, F expert intermediate, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from moe_runtime.simulate.hardware import Hardware
from moe_runtime.simulate.models import Mixer, SimModel

_ACTIVATION_BYTES = 2  # of an element between kernels: bfloat16

Amount = TypeVar("Amount", float, NDArray[np.float64])


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A (grouped) matrix product of one size, `weights` x `rows`."""

    inputs: int
    outputs: int
    weight_bytes: float  # of one weight; activations are multiplied in the same type
    grouped: bool = False


def product_seconds(hardware: Hardware, product: Product, rows: Amount, matrices: Amount) -> Amount:
    """Seconds of a product.

    Args:
        rows: rows of activations, in all matrices together.
        matrices: weight matrices that are read, each once.
    """
    e = hardware.efficiency
    flops_share, bytes_share = (
        (e.grouped_flops, e.grouped_bytes) if product.grouped else (e.gemm_flops, e.gemm_bytes)
    )
    peak = hardware.fp8_flops if product.weight_bytes <= 1 else hardware.bf16_flops
    bandwidth = bytes_share * hardware.bytes_per_s
    # Tiles are computed whole: on average, half of each expert's last one is padding.
    padded = rows + matrices * (e.tile_rows / 2) if product.grouped else rows
    compute = 2 * padded * product.inputs * product.outputs / (flops_share * peak)
    read = matrices * product.inputs * product.outputs * product.weight_bytes
    memory = (read + rows * product.inputs * min(product.weight_bytes, _ACTIVATION_BYTES)) / bandwidth
    written = rows * product.outputs * _ACTIVATION_BYTES / bandwidth
    power = e.overlap_power
    return e.kernel_s + (compute**power + memory**power) ** (1 / power) + written


def linear_seconds(
    hardware: Hardware, tokens: float, inputs: int, outputs: int, weight_bytes: float
) -> float:
    """Seconds of a dense projection of `tokens` rows."""
    return product_seconds(
        hardware, Product(inputs=inputs, outputs=outputs, weight_bytes=weight_bytes), tokens, 1.0
    )


def gated_mlp_seconds(hardware: Hardware, model: SimModel, tokens: float, intermediate: int) -> float:
    """Seconds of a dense gated MLP: a shared expert, or a layer without experts; 0 where it has no size."""
    if not intermediate:
        return 0.0
    up = linear_seconds(hardware, tokens, model.hidden_size, 2 * intermediate, model.linear_bytes)
    down = linear_seconds(hardware, tokens, intermediate, model.hidden_size, model.linear_bytes)
    return up + stream_seconds(hardware, 3 * tokens * intermediate * _ACTIVATION_BYTES) + down


def routed_seconds(hardware: Hardware, model: SimModel, rows: Amount, touched: Amount) -> Amount:
    """Seconds of the routed experts of one layer.

    Args:
        rows: (token, expert) pairs on the rank; an array [R] gives the seconds of each rank.
        touched: local experts with at least one row, whose weights are read once.
    """
    hidden, intermediate = model.hidden_size, model.moe_intermediate
    up = Product(inputs=hidden, outputs=2 * intermediate, weight_bytes=model.expert_bytes, grouped=True)
    down = Product(inputs=intermediate, outputs=hidden, weight_bytes=model.expert_bytes, grouped=True)
    activation = stream_seconds(hardware, 3 * rows * intermediate * _ACTIVATION_BYTES)
    return (
        product_seconds(hardware, up, rows, touched)
        + activation
        + product_seconds(hardware, down, rows, touched)
    )


def stream_seconds(hardware: Hardware, num_bytes: Amount) -> Amount:
    """Seconds of a kernel that only moves data."""
    e = hardware.efficiency
    return e.kernel_s + num_bytes / (e.stream_bytes * hardware.bytes_per_s)


def small_kernels_seconds(hardware: Hardware, model: SimModel, tokens: float, count: int) -> float:
    """Seconds of `count` kernels that read and write a hidden state each."""
    return count * stream_seconds(hardware, 2 * tokens * model.hidden_size * _ACTIVATION_BYTES)


def decode_mixer_seconds(
    hardware: Hardware, model: SimModel, mixer: Mixer, sequences: float, context: float
) -> float:
    """Seconds of one attention layer that gives each of `sequences` one token after `context` cached ones."""
    e = hardware.efficiency
    seconds = _projection_seconds(hardware, model, mixer, sequences)
    for inputs, outputs, heads in mixer.decode_products:
        product = Product(inputs=inputs, outputs=outputs, weight_bytes=_ACTIVATION_BYTES)
        # Each head multiplies every token by a matrix of its own.
        seconds += product_seconds(hardware, product, sequences * heads, float(heads))
    if mixer.cache_bytes:
        read = sequences * context * mixer.cache_bytes / (e.decode_attention_bytes * hardware.bytes_per_s)
        compute = sequences * context * mixer.decode_flops / (e.decode_attention_flops * hardware.bf16_flops)
        seconds += e.kernel_s + max(read, compute)
    if mixer.state_bytes:
        seconds += stream_seconds(hardware, 2 * sequences * mixer.state_bytes)
    return seconds + small_kernels_seconds(hardware, model, sequences, mixer.small_kernels)


def prefill_mixer_seconds(
    hardware: Hardware, model: SimModel, mixer: Mixer, tokens: float, prompt: float
) -> float:
    """Seconds of one attention layer over `tokens` tokens of prompts of `prompt` tokens each, causal."""
    e = hardware.efficiency
    seconds = _projection_seconds(hardware, model, mixer, tokens)
    for inputs, outputs in mixer.prefill_linears:
        seconds += linear_seconds(hardware, tokens, inputs, outputs, model.linear_bytes)
    if mixer.cache_bytes:
        flops = tokens * (prompt + 1) / 2 * mixer.prefill_flops
        seconds += e.kernel_s + flops / (e.prefill_attention_flops * hardware.bf16_flops)
    if mixer.state_bytes:
        compute = tokens * mixer.state_flops / (e.chunked_delta_flops * hardware.bf16_flops)
        seconds += compute + stream_seconds(hardware, tokens / prompt * mixer.state_bytes)
    return seconds + small_kernels_seconds(hardware, model, tokens, mixer.small_kernels)


def head_seconds(hardware: Hardware, model: SimModel, rows: float) -> float:
    """Seconds of the LM head in bfloat16, for the rows whose next token is wanted."""
    return linear_seconds(hardware, rows, model.hidden_size, model.vocab_size, _ACTIVATION_BYTES)


def _projection_seconds(hardware: Hardware, model: SimModel, mixer: Mixer, tokens: float) -> float:
    return sum(linear_seconds(hardware, tokens, i, o, model.linear_bytes) for i, o in mixer.linears)
