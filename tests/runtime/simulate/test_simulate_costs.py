"""Costs against hand-computed examples, and against the published kernel tables that their constants come from."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from moe_kernels.select import KernelPlan
from moe_models.interfaces import ExpertShard, KVCacheSpec
from moe_models.qwen3_next import Qwen3NextForCausalLM
from moe_runtime.bench.checkpoint import preset_config
from moe_runtime.simulate import costs
from moe_runtime.simulate.dispatch import DispatchPlan, exchange_seconds
from moe_runtime.simulate.hardware import B200, H100, H200, H800, cpu_rank
from moe_runtime.simulate.models import deepseek_v3, from_config, qwen3_next_80b
from moe_runtime.simulate.routing import Layout, ZipfRouting

# DeepGEMM's README, May 2025, fp8 on H800: matrices, rows of each, outputs, inputs, TFLOP/s.
DEEPGEMM = [
    (1, 64, 2112, 7168, 206),
    (1, 64, 24576, 1536, 289),
    (1, 64, 32768, 512, 219),
    (1, 64, 7168, 16384, 336),
    (1, 64, 4096, 7168, 287),
    (1, 64, 7168, 2048, 295),
    (1, 128, 2112, 7168, 352),
    (1, 128, 24576, 1536, 535),
    (1, 128, 32768, 512, 358),
    (1, 128, 7168, 16384, 645),
    (1, 128, 4096, 7168, 533),
    (1, 128, 7168, 2048, 510),
    (1, 4096, 2112, 7168, 1058),
    (1, 4096, 24576, 1536, 990),
    (1, 4096, 32768, 512, 590),
    (1, 4096, 7168, 16384, 1358),
    (1, 4096, 4096, 7168, 1304),
    (1, 4096, 7168, 2048, 1025),
    (4, 8192, 4096, 7168, 1297),
    (4, 8192, 7168, 2048, 1099),
    (8, 4096, 4096, 7168, 1288),
    (8, 4096, 7168, 2048, 1093),
    (1, 1024, 4096, 7168, 1233),
    (1, 1024, 7168, 2048, 925),
    (2, 512, 4096, 7168, 1040),
    (2, 512, 7168, 2048, 916),
    (4, 256, 4096, 7168, 932),
    (4, 256, 7168, 2048, 815),
]
# DeepEP's low-latency table, H800, 128 tokens a rank, hidden 7168, top-8: ranks, microseconds of both ways.
DEEPEP = [(8, 77, 114), (16, 118, 195), (32, 155, 273), (64, 173, 314), (128, 192, 369), (256, 194, 360)]


@pytest.fixture
def bfloat16() -> Iterator[None]:
    """What modules are built in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


def test_products_reproduce_the_table_that_their_constants_were_fitted_to() -> None:
    errors = []
    for matrices, rows, outputs, inputs, tflops in DEEPGEMM:
        product = costs.Product(inputs=inputs, outputs=outputs, weight_bytes=1)
        seconds = costs.product_seconds(H800, product, float(matrices * rows), float(matrices))
        errors.append(np.log(seconds / (2 * matrices * rows * outputs * inputs / (tflops * 1e12))))
    assert np.sqrt(np.mean(np.square(errors))) < 0.095
    assert np.max(np.abs(errors)) < 0.26


@pytest.mark.parametrize(("ranks", "dispatch_us", "combine_us"), DEEPEP)
def test_exchanges_reproduce_the_table_that_their_constants_were_fitted_to(
    ranks: int, dispatch_us: float, combine_us: float
) -> None:
    layout = Layout(num_ranks=ranks, ranks_per_node=8, placement="contiguous")
    load = ZipfRouting(256, 8).loads(layout, 128 * ranks)[0].balanced()
    found = exchange_seconds(H800, DispatchPlan(kind="deepep_low_latency"), layout, load, 128, 7168, 8)

    assert found.dispatch * 1e6 == pytest.approx(dispatch_us, rel=0.09)
    assert found.combine * 1e6 == pytest.approx(combine_us, rel=0.09)
    assert found.waiting == 0


def test_a_product_by_hand() -> None:
    """64 rows by a bfloat16 matrix of 1000 x 2000 on an H100."""
    product = costs.Product(inputs=1000, outputs=2000, weight_bytes=2)
    compute = 2 * 64 * 1000 * 2000 / (0.66 * 989.5e12)
    memory = (1000 * 2000 * 2 + 64 * 1000 * 2) / (0.86 * 3350e9)
    written = 64 * 2000 * 2 / (0.86 * 3350e9)
    by_hand = 2.5e-6 + (compute**2.5 + memory**2.5) ** 0.4 + written

    assert costs.product_seconds(H100, product, 64.0, 1.0) == pytest.approx(by_hand, rel=1e-9)


def test_only_touched_experts_are_read() -> None:
    """One row on each of 4 experts of Qwen3-Next: three matrices of 2048 x 512 in fp8 each."""
    model = qwen3_next_80b()
    few = costs.routed_seconds(H100, model, 4.0, 4.0)
    many = costs.routed_seconds(H100, model, 64.0, 64.0)
    weights = 60 * 3 * 2048 * 512 / (0.86 * 3350e9)

    assert many - few == pytest.approx(weights, rel=0.05)


def test_decode_attention_by_hand() -> None:
    """The caches of 256 sequences of 2,000 tokens of DeepSeek-V3: memory moves slower than tensor cores multiply."""
    model = deepseek_v3()
    mixer = model.mixers[0]
    short = costs.decode_mixer_seconds(H100, model, mixer, 256, 1000)
    long = costs.decode_mixer_seconds(H100, model, mixer, 256, 2000)
    read = 256 * 1000 * 576 * 2 / (0.896 * 3350e9)
    compute = 256 * 1000 * 2 * 128 * (576 + 512) / (0.667 * 989.5e12)

    assert long - short == pytest.approx(max(read, compute), rel=1e-6)


def test_recurrent_states_are_read_and_written() -> None:
    model = qwen3_next_80b()
    mixer = next(m for m in model.mixers if m.name == "linear_attention")
    assert mixer.state_bytes == 32 * 128 * 128 * 4 + 8192 * 3 * 2
    more = costs.decode_mixer_seconds(H100, model, mixer, 512, 0) - costs.decode_mixer_seconds(
        H100, model, mixer, 256, 0
    )
    assert more > 2 * 256 * mixer.state_bytes / 3350e9


def test_model_sizes_are_the_known_ones() -> None:
    for model, billions in ((qwen3_next_80b(), 79.7), (deepseek_v3(), 671)):
        experts = model.num_moe_layers * model.num_experts * model.expert_weights
        everything = experts + model.linear_weights + 2 * model.vocab_size * model.hidden_size
        assert everything / 1e9 == pytest.approx(billions, rel=0.002)


@pytest.mark.parametrize("hardware", [H100, H200, B200, cpu_rank(2)])
def test_seconds_grow_with_work(hardware) -> None:  # type: ignore[no-untyped-def]
    model = qwen3_next_80b()
    routed = [
        costs.routed_seconds(hardware, model, float(n), min(float(n), 64.0)) for n in (1, 8, 64, 512, 4096)
    ]
    assert routed == sorted(routed)
    for mixer in model.mixers:
        decode = [costs.decode_mixer_seconds(hardware, model, mixer, n, 1000) for n in (1, 8, 64, 512)]
        prefill = [costs.prefill_mixer_seconds(hardware, model, mixer, n, 256) for n in (256, 1024, 8192)]
        assert decode == sorted(decode)
        assert prefill == sorted(prefill)


def test_sizes_are_those_of_the_model_itself(bfloat16: None) -> None:
    """Parameters and caches of a small Qwen3-Next, as its modules have them."""
    config = preset_config("peers-536m")
    with torch.device("meta"):
        real = Qwen3NextForCausalLM(config, ExpertShard.whole(config["num_experts"]), KernelPlan.reference())
    simulated = from_config("test", config, linear_bytes=2, expert_bytes=2)
    specs = real.cache_specs()

    assert simulated.rank_weight_bytes(64) == pytest.approx(
        2 * sum(p.numel() for p in real.parameters()), rel=0.001
    )
    assert simulated.sequence_bytes(1) - simulated.sequence_bytes(0) == sum(
        s.bytes_per_token for s in specs if isinstance(s, KVCacheSpec)
    )
    real_state = sum(s.bytes_per_sequence for s in specs if not isinstance(s, KVCacheSpec))
    assert simulated.sequence_bytes(0) == pytest.approx(real_state, rel=0.001)
