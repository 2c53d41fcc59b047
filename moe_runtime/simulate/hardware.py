"""Hardware: what devices and links can do by their data sheets. Frozen: results are never tuned by these numbers.

GPUs' memory bandwidth and operations a second are those of `moe_kernels.aot.roofline`; the rest stands here.

How much of it kernels and libraries reach is in `efficiency`; together they are all constants of the simulator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moe_kernels.aot import roofline
from moe_runtime.errors import ConfigError, did_you_mean
from moe_runtime.simulate.efficiency import CPU, HOPPER, Efficiency

GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One level of the interconnect, as one GPU sees it, in one direction."""

    bytes_per_s: float  # by the data sheet
    reached: float  # the share of it that the exchanges of experts reach


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One kind of device, and the links between devices of its kind."""

    name: str
    source: str  # of the device's numbers
    memory_bytes: float
    bytes_per_s: float  # of its memory
    bf16_flops: float  # dense, a second; a multiplication and an addition are two
    fp8_flops: float
    scale_up: Link  # NVLink among the GPUs of one node; shared memory between ranks of a host
    scale_out: Link  # the GPU's own network card
    gpus_per_node: int  # that scale_up connects
    efficiency: Efficiency
    # That all ranks of a host read together at most; None: each has its own memory, or the limit is not known.
    host_bytes_per_s: float | None = None

    def with_overrides(
        self,
        *,
        gpus_per_node: int | None = None,
        nvlink_gb_s: float | None = None,
        network_gbps: float | None = None,
        exchange_us: float | None = None,
        network_latency_us: float | None = None,
    ) -> Hardware:
        """The same with other links.

        Args:
            nvlink_gb_s: GB/s of a GPU's NVLink, one way.
            network_gbps: Gb/s of a GPU's network card.
            exchange_us: microseconds of an exchange or a collective, without its bytes and peers.
            network_latency_us: microseconds that each further node adds to a collective.

        Raises:
            ConfigError: one of them is not above 0.
        """
        for flag, value in (
            ("--gpus-per-node", gpus_per_node),
            ("--nvlink-gb-s", nvlink_gb_s),
            ("--network-gbps", network_gbps),
            ("--exchange-us", exchange_us),
            ("--network-latency-us", network_latency_us),
        ):
            if value is not None and not value > 0:
                raise ConfigError(f"{flag} must be above 0, got {value}")
        up, out, reached = self.scale_up, self.scale_out, self.efficiency
        if nvlink_gb_s is not None:
            up = replace(up, bytes_per_s=nvlink_gb_s * GB)
        if network_gbps is not None:
            out = replace(out, bytes_per_s=network_gbps * GB / 8)
        if exchange_us is not None:
            reached = replace(reached, exchange_s=exchange_us / 1e6, collective_s=exchange_us / 1e6)
        if network_latency_us is not None:
            reached = replace(reached, hop_s=network_latency_us / 1e6)
        return replace(
            self,
            scale_up=up,
            scale_out=out,
            efficiency=reached,
            gpus_per_node=gpus_per_node or self.gpus_per_node,
        )


# Shares of links: fitted to DeepEP's own table, see `efficiency`. NVLink: 151 of the 200 GB/s of an H800.
_NVLINK_REACHED = 0.756
_RDMA_REACHED = 0.894
# One ConnectX-7 of 400 Gb/s for each GPU: NVIDIA DGX H100, H200 and B200 data sheets.
_CX7 = Link(bytes_per_s=50 * GB, reached=_RDMA_REACHED)


def _gpu(name: str, peak: roofline.Peak, *, memory_gb: float, nvlink_gb_s: float) -> Hardware:
    """A GPU of a DGX or HGX node: the peaks of the kernels' rooflines, and NVLink one way."""
    return Hardware(
        name=name,
        source=peak.source,
        memory_bytes=memory_gb * GB,
        bytes_per_s=peak.bytes_per_s,
        bf16_flops=peak.bf16_flops,
        fp8_flops=peak.fp8_flops or peak.bf16_flops,
        scale_up=Link(bytes_per_s=nvlink_gb_s * GB, reached=_NVLINK_REACHED),
        scale_out=_CX7,
        gpus_per_node=8,
        efficiency=HOPPER,
    )


# NVLink 4: 900 GB/s both ways; NVLink 5: 1.8 TB/s.
H100 = _gpu("H100", roofline.H100_SXM, memory_gb=80, nvlink_gb_s=450)
H200 = _gpu("H200", roofline.H200, memory_gb=141, nvlink_gb_s=450)
# Efficiencies of Hopper kernels: nothing comparable is published for this GPU.
B200 = _gpu("B200", roofline.B200, memory_gb=180, nvlink_gb_s=900)
# What DeepEP and DeepGEMM publish was measured on it; here only to hold the formulas to those tables.
H800 = replace(
    H100,
    name="H800",
    source="an H100 with 400 GB/s of NVLink both ways (DeepSeek-V3 report, section 3.1)",
    scale_up=Link(bytes_per_s=200 * GB, reached=_NVLINK_REACHED),
)
# One thread of an AMD EPYC with AVX2: `bench kernels`, CPU time. A rank has as many of them as it has threads.
CPU_THREAD = Hardware(
    name="cpu",
    source="bench kernels on one thread of an AMD EPYC (Zen 3, AVX2)",
    memory_bytes=12 * GB,
    bytes_per_s=22.3 * GB,
    bf16_flops=68.1e9,  # of torch's float32 product; weights in bfloat16 are multiplied in float32
    fp8_flops=68.1e9,
    # bench dispatch, 2 ranks, hidden 2048, bfloat16: 62 us and 1.49 us a token, which crosses twice.
    scale_up=Link(bytes_per_s=5.5 * GB, reached=1.0),
    scale_out=Link(bytes_per_s=5.5 * GB, reached=1.0),
    gpus_per_node=1024,
    efficiency=CPU,
)

GPUS: Mapping[str, Hardware] = {gpu.name: gpu for gpu in (H100, H200, B200, H800)}


def find_gpu(name: str) -> Hardware:
    """The GPU of this name, in any case.

    Raises:
        ConfigError: there is none.
    """
    found = {key.lower(): gpu for key, gpu in GPUS.items()}.get(name.lower())
    if found is None:
        raise ConfigError(f"--gpu must be one of {', '.join(GPUS)}, got {name!r}{did_you_mean(name, GPUS)}")
    return found


def cpu_rank(num_threads: int, thread: Hardware = CPU_THREAD, ranks_on_host: int = 1) -> Hardware:
    """A rank with so many threads, each with a core of its own.

    Memory reads grow with threads, up to the rank's share of what the host's memory gives: all ranks read at once.
    """
    bytes_per_s = thread.bytes_per_s * num_threads
    if thread.host_bytes_per_s is not None:
        bytes_per_s = min(bytes_per_s, thread.host_bytes_per_s / ranks_on_host)
    return replace(
        thread,
        bytes_per_s=bytes_per_s,
        bf16_flops=thread.bf16_flops * num_threads,
        fp8_flops=thread.fp8_flops * num_threads,
    )
