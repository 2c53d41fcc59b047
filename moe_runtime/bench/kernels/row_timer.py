"""RowTimer: how long a row of the experts' tables takes on this GPU, for a step that its bound stands for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_kernels.device import DeviceProfile
from moe_kernels.grouped_gemm.launch import GroupedGemmLaunch
from moe_kernels.grouped_gemm.tables import TableRow
from moe_kernels.shapes import KernelShapes
from moe_runtime.bench.kernels.experts_launch import launch_of_row
from moe_runtime.bench.kernels.experts_reference import (
    TOLERANCE,
    experts_float64,
    relative_error,
    rounds_activations,
)
from moe_runtime.bench.kernels.gpu_experts import ExpertInputs, ExpertWeights, make_inputs, ours
from moe_runtime.bench.kernels.gpu_timing import capture, median_seconds

_INPUTS = 4
# Of the plain RuntimeError that Triton's passes end with. Others are CUDA's, after which no time means anything.
_PASSES = ("PassManager::run failed", "failed to translate module")


class RowTimer:
    """Seconds of one layer's experts with a row's tiles; inf, and a note, for what serving could not use."""

    def __init__(
        self,
        profile: DeviceProfile,
        shapes: KernelShapes,
        dtype: torch.dtype,
        layers: Sequence[ExpertWeights],
        *,
        num_tokens: int,
        num_rounds: int,
    ) -> None:
        self.discarded: list[str] = []  # what and why, in the order of the search
        self._profile, self._shapes, self._dtype, self._layers = profile, shapes, dtype, layers
        self._num_rounds = num_rounds
        self._inputs: list[ExpertInputs] = [make_inputs(shapes, num_tokens, seed) for seed in range(_INPUTS)]
        self._wanted: dict[bool, torch.Tensor] = {}  # by whether activations are rounded to float8

    def __call__(self, row: TableRow) -> float:
        """Seconds, or inf where it does not compile, does not fit or gives another result than the reference."""
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError

        launch = launch_of_row(row, self._profile, self._shapes, self._dtype)
        try:
            error = self._error(launch)
        except (CompilationError, OutOfResources, PTXASError) as refusal:
            return self._discard(row, str(refusal))
        except RuntimeError as refusal:
            if not any(text in str(refusal) for text in _PASSES):
                raise
            return self._discard(row, str(refusal))
        if error > TOLERANCE:
            return self._discard(row, f"relative error {error:.1e}, wanted at most {TOLERANCE:.0e}")
        calls = [
            ours(self._layers[i % len(self._layers)], some, launch) for i, some in enumerate(self._inputs)
        ]
        return median_seconds({"": capture(calls)}, self._num_rounds)[""] / len(calls)

    def _error(self, launch: GroupedGemmLaunch) -> float:
        weights, inputs = self._layers[0], self._inputs[0]
        rounds = rounds_activations(launch, inputs.x_GH.shape[0], weights)
        if rounds not in self._wanted:
            self._wanted[rounds] = experts_float64(weights, inputs, rounds=rounds)
        y = ours(weights, inputs, launch)()
        assert isinstance(y, torch.Tensor)
        return relative_error(y, self._wanted[rounds])

    def _discard(self, row: TableRow, why: str) -> float:
        last_line = why.strip().rpartition("\n")[2]
        self.discarded.append(f"{row.regime} {row.gate_up} and {row.down}: {last_line}")
        return float("inf")
