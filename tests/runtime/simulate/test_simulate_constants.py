"""The frozen constants, once more as literals: whoever changes one has to say so here and in docs/simulate.md."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from moe_kernels.aot import roofline
from moe_runtime.simulate.efficiency import CPU, HOPPER, Efficiency
from moe_runtime.simulate.hardware import B200, CPU_THREAD, GPUS, H100, H200, H800, Hardware

# memory and its bytes a second, bfloat16 and fp8 operations a second, NVLink and network bytes a second one way
DATA_SHEETS = {
    "H100": (80e9, 3.35e12, 989.5e12, 1979e12, 450e9, 50e9),
    "H200": (141e9, 4.8e12, 989.5e12, 1979e12, 450e9, 50e9),
    "B200": (180e9, 8e12, 2250e12, 4500e12, 900e9, 50e9),
    "H800": (80e9, 3.35e12, 989.5e12, 1979e12, 200e9, 50e9),
    "cpu": (12e9, 22.3e9, 68.1e9, 68.1e9, 5.5e9, 5.5e9),
}
REACHED_OF_HOPPER = {
    "gemm_flops": 0.66,
    "gemm_bytes": 0.86,
    "grouped_flops": 0.66,
    "grouped_bytes": 0.86,
    "overlap_power": 2.5,
    "tile_rows": 64,
    "kernel_s": 2.5e-6,
    "stream_bytes": 0.867,
    "decode_attention_flops": 0.667,
    "decode_attention_bytes": 0.896,
    "prefill_attention_flops": 0.5,
    "chunked_delta_flops": 0.25,
    "exchange_s": 31.2e-6,
    "peer_s": 9.7e-9,
    "collective_s": 20e-6,
    "hop_s": 5e-6,
    "collective_reached": 0.81,
    "comm_sms": 24 / 132,
    "step_s": 0.78e-3,
}
REACHED_OF_CPU = {
    "gemm_flops": 0.63,
    "gemm_bytes": 0.69,
    "grouped_flops": 0.57,
    "grouped_bytes": 0.50,
    "overlap_power": 2.5,
    "tile_rows": 1,
    "kernel_s": 20e-6,
    "stream_bytes": 0.67,
    "decode_attention_flops": 0.17,
    "decode_attention_bytes": 0.69,
    "prefill_attention_flops": 0.17,
    "chunked_delta_flops": 0.17,
    "exchange_s": 31e-6,
    "peer_s": 0.0,
    "collective_s": 31e-6,
    "hop_s": 0.0,
    "collective_reached": 1.0,
    "comm_sms": 0.0,
    "step_s": 0.47e-3,
}


@pytest.mark.parametrize("hardware", [*GPUS.values(), CPU_THREAD], ids=lambda hardware: hardware.name)
def test_data_sheets_are_frozen(hardware: Hardware) -> None:
    found = (
        hardware.memory_bytes,
        hardware.bytes_per_s,
        hardware.bf16_flops,
        hardware.fp8_flops,
        hardware.scale_up.bytes_per_s,
        hardware.scale_out.bytes_per_s,
    )
    assert found == DATA_SHEETS[hardware.name]


def test_gpus_differ_in_nothing_else() -> None:
    for gpu in (H100, H200, B200, H800):
        assert (gpu.scale_up.reached, gpu.scale_out.reached) == (0.756, 0.894)
        assert (gpu.gpus_per_node, gpu.efficiency, gpu.host_bytes_per_s) == (8, HOPPER, None)
    assert (CPU_THREAD.scale_up.reached, CPU_THREAD.scale_out.reached) == (1, 1)
    assert (CPU_THREAD.gpus_per_node, CPU_THREAD.efficiency, CPU_THREAD.host_bytes_per_s) == (1024, CPU, None)


@pytest.mark.parametrize(("reached", "frozen"), [(HOPPER, REACHED_OF_HOPPER), (CPU, REACHED_OF_CPU)])
def test_what_is_reached_of_them_is_frozen(reached: Efficiency, frozen: dict[str, Any]) -> None:
    assert asdict(reached) == frozen


def test_simulated_gpus_have_the_peaks_of_the_kernels_rooflines() -> None:
    """A benchmark's share of the roofline and a simulated share of it are of the same peak."""
    of_devices = {
        "H100": roofline.peak_of("NVIDIA H100 80GB HBM3", (9, 0)),
        "H200": roofline.peak_of("NVIDIA H200", (9, 0)),
        "B200": roofline.peak_of("NVIDIA B200", (10, 0)),
    }
    for name, peak in of_devices.items():
        gpu = GPUS[name]
        assert peak is not None
        assert (gpu.bytes_per_s, gpu.bf16_flops, gpu.fp8_flops) == (
            peak.bytes_per_s,
            peak.bf16_flops,
            peak.fp8_flops,
        )
        assert gpu.source == peak.source
