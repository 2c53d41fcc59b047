"""Efficiency: what share of a data sheet kernels and libraries reach, and their fixed times. Frozen constants.

Sources are measurements of single kernels and single exchanges, never of whole deployments: those are what the
simulator has to predict. Where a number is an assumption, its comment says so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Shares of peak from 0 to 1, and seconds."""

    gemm_flops: float  # dense and grouped products
    gemm_bytes: float
    grouped_flops: float
    grouped_bytes: float
    overlap_power: float  # p of (compute^p + memory^p)^(1/p): how far the two hide each other
    tile_rows: int  # rows that an expert's own are rounded up to
    kernel_s: float  # of every kernel, however little it does
    stream_bytes: float  # kernels that only move data, recurrent state included
    decode_attention_flops: float
    decode_attention_bytes: float
    prefill_attention_flops: float
    chunked_delta_flops: float
    exchange_s: float  # of one dispatch or combine over NVLink or RDMA, without its bytes
    peer_s: float  # more of it for every other rank
    collective_s: float  # of one NCCL collective, without its bytes and hops
    hop_s: float  # of one more node in an NCCL ring, or one more peer in an NCCL all-to-all
    collective_reached: float  # share of a link that NCCL's large collectives reach
    comm_sms: float  # share of the GPU that a high-throughput exchange occupies while it runs
    step_s: float  # of a step outside the model: scheduling, batch building, sampling


# Products: least squares over the 28 rows of the table in DeepGEMM's README of 2025-05 (fp8, H800; rms 9%).
# Exchanges: least squares over the 12 rows of DeepEP's low-latency table (H800, EP 8-256; rms 3%).
HOPPER = Efficiency(
    gemm_flops=0.66,
    gemm_bytes=0.86,
    grouped_flops=0.66,
    grouped_bytes=0.86,
    overlap_power=2.5,
    tile_rows=64,  # block of DeepGEMM's masked layout
    kernel_s=2.5e-6,
    stream_bytes=0.867,  # device-to-device copy of an H100: 2,903 of 3,350 GB/s (github.com/aigatech/vpbenchmarking)
    decode_attention_flops=0.667,  # FlashMLA's README: 660 TFLOP/s on H800
    decode_attention_bytes=0.896,  # the same: 3,000 GB/s
    prefill_attention_flops=0.5,  # assumed; FlashAttention-3 (arXiv 2407.08608): up to 0.75, less if causal and short
    chunked_delta_flops=0.25,  # assumed: products of 64 x 128 in a chain
    exchange_s=31.2e-6,
    peer_s=9.7e-9,
    collective_s=20e-6,  # assumed: a small collective on one node of 8 H100
    hop_s=5e-6,  # assumed: one RDMA message and its acknowledgement
    collective_reached=0.81,  # all-gather of 32 H100 on 4 nodes: 323 of 400 GB/s (vpbenchmarking)
    comm_sms=24 / 132,  # DeepEP's README sets 24 of an H100's 132 multiprocessors
    step_s=0.78e-3,  # bench overhead, 256 greedy sequences: docs/performance-log.md
)

# bench kernels, AVX2, one thread: reached by the kernels, as shares of read bandwidth and of sgemm.
CPU = Efficiency(
    gemm_flops=0.63,
    gemm_bytes=0.69,
    grouped_flops=0.57,
    grouped_bytes=0.50,
    overlap_power=2.5,
    tile_rows=1,  # rows are computed in blocks of 4 and 1: nothing is padded
    kernel_s=20e-6,  # between a small torch operation (6-10 us) and a native call from Python (60 us)
    stream_bytes=0.67,
    decode_attention_flops=0.17,
    decode_attention_bytes=0.69,  # as a linear layer; compute limits attention on this CPU
    prefill_attention_flops=0.17,  # assumed: as decode
    chunked_delta_flops=0.17,  # assumed: as attention
    exchange_s=31e-6,  # bench dispatch, shared memory, 2 ranks: 62 us for dispatch and combine
    peer_s=0.0,
    collective_s=31e-6,
    hop_s=0.0,
    collective_reached=1.0,
    comm_sms=0.0,
    step_s=0.47e-3,  # bench overhead, 32 greedy sequences: docs/performance-log.md
)
