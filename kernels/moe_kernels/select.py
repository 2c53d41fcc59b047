"""KernelPlan: which implementation of each operation a rank runs, chosen from its DeviceProfile, and why."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from moe_kernels.attention.launch import launch_for
from moe_kernels.blocks.limits import obstacle
from moe_kernels.device import DeviceProfile
from moe_kernels.grouped_gemm.launch import choose as choose_experts
from moe_kernels.native.units import LEVELS
from moe_kernels.shapes import KernelShapes

FAMILIES = ("auto", "reference", "triton", "cpu")
_FLASHINFER_HEADS = (64, 128, 256)  # sizes that it has kernels for
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True)
class Choice:
    """The implementation chosen for one operation."""

    implementation: str  # a name in that operation's table
    reason: str  # one sentence
    launch: Any = None  # launch parameters, of the operation's own type; None: the implementation's default
    weights: torch.dtype | None = None  # what its weights are kept in, with scales; None: the model's dtype

    def __str__(self) -> str:
        weights = "" if self.weights is None else f"; weights in {str(self.weights).removeprefix('torch.')}"
        return f"{self.implementation}: {self.reason}{weights}"

    @property
    def isa(self) -> str | None:
        """The instruction set in the implementation's name, which compiled CPU kernels have."""
        return self.implementation.partition(":")[2] or None

    def unquantized(self) -> Choice:
        """The same for a weight that is always kept in the model's dtype."""
        return replace(self, weights=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelPlan:
    """One choice for each operation; set once by `select`, read by the layers' constructors."""

    grouped_gemm: Choice
    linear: Choice
    routing: Choice
    gated_delta: Choice
    conv: Choice
    attention: Choice
    norm: Choice
    blocks: Choice  # whole layers in one call; "reference": operation by operation

    @classmethod
    def uniform(cls, implementation: str, reason: str) -> KernelPlan:
        """The same choice for every operation."""
        return cls(**{field.name: Choice(implementation, reason) for field in fields(cls)})

    @classmethod
    def reference(cls, reason: str = "asked for") -> KernelPlan:
        """Plain torch everywhere: what tests compare with, and what inspection builds a model with."""
        return cls.uniform("reference", reason)

    def with_weights(self, *, linear: torch.dtype | None, experts: torch.dtype | None) -> KernelPlan:
        """The same plan for weights kept in int8 or float8_e4m3fn with scales; None is the model's dtype."""
        plan = replace(
            self,
            linear=replace(self.linear, weights=linear),
            grouped_gemm=replace(self.grouped_gemm, weights=experts),
        )
        if linear in (None, torch.int8):
            return plan
        return replace(plan, blocks=_one_by_one(f"weights are kept in {linear}"))

    def warm_up_rows(self) -> tuple[int, ...]:
        """Numbers of rows at the experts that between them need every kernel; () where nothing is compiled."""
        if all(getattr(self, field.name).implementation != "triton" for field in fields(self)):
            return ()
        launch = self.grouped_gemm.launch
        return (1,) if launch is None else launch.warm_up_rows()

    def describe(self) -> str:
        """One line for each operation: its name, the implementation, the reason, quantised weights."""
        choices = {field.name: getattr(self, field.name) for field in fields(self)}
        width = max(map(len, choices))
        return "\n".join(f"{name:<{width}}  {choice}" for name, choice in choices.items())


def select(
    profile: DeviceProfile,
    shapes: KernelShapes,
    dtype: torch.dtype,
    *,
    family: str = "auto",
    libraries: Set[str] = frozenset(),
) -> KernelPlan:
    """The plan for a device of this profile that computes a model of these shapes in `dtype`.

    Args:
        family: one of FAMILIES; all but "auto" force it.
        libraries: which optional ones this process can use: "native" (our compiled CPU kernels), "fla",
            "flashinfer" (see `moe_kernels.libraries`).

    Raises ValueError for a family, a dtype or a dtype of experts that there are no kernels for.
    """
    if family not in FAMILIES:
        raise ValueError(f"kernel family is {family!r}; wanted one of {list(FAMILIES)}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype}; the kernels compute in {', '.join(map(str, _DTYPES))}")
    if family == "reference":
        return KernelPlan.reference(f"plain torch on {profile.kind}, forced by the kernel family 'reference'")
    if family == "auto" and dtype == torch.float64:
        return KernelPlan.reference("plain torch: no other kernels compute in float64")
    if family == "triton" or (family == "auto" and profile.kind == "cuda"):
        return _triton_plan(profile, shapes, dtype, libraries)
    if profile.kind != "cpu":
        raise ValueError(
            f"kernel family is {family!r}, but this rank's device is {profile.name} ({profile.kind})"
        )
    return _cpu_plan(profile, shapes, dtype, "native" in libraries)


def cpu_levels(profile: DeviceProfile) -> list[str]:
    """The instruction sets that the native library is compiled for and this CPU has, best first."""
    has = set(profile.instruction_sets)
    return [level for level, needed in reversed(LEVELS.items()) if has.issuperset(needed)]


def _cpu_plan(
    profile: DeviceProfile, shapes: KernelShapes, dtype: torch.dtype, has_native: bool
) -> KernelPlan:
    levels = cpu_levels(profile)
    if has_native and levels:
        level = levels[0]
        plan = KernelPlan.uniform(f"cpu:{level}", f"compiled kernels for {level}, the best that this CPU has")
        hindrance = obstacle(shapes, dtype)
        if hindrance is None:
            return replace(
                plan, blocks=Choice(f"cpu:{level}", "whole layers in one call of the compiled kernels")
            )
        return replace(plan, blocks=_one_by_one(hindrance))
    missing = "the compiled kernels are missing" if levels else "no compiled kernels for this CPU"
    plan = KernelPlan.reference(f"plain torch: {missing}")
    if dtype == torch.float32:
        return plan
    products = Choice("float32", f"plain torch in float32, as {missing} and torch is slow in {dtype}")
    return replace(plan, grouped_gemm=products, linear=products)


def _triton_plan(
    profile: DeviceProfile, shapes: KernelShapes, dtype: torch.dtype, libraries: Set[str]
) -> KernelPlan:
    if dtype == torch.float64:
        raise ValueError("kernel family is 'triton', which has no float64; use 'reference'")
    if shapes.expert_dtype == torch.int8:
        raise ValueError(
            f"the experts are int8, which is for CPUs; this rank's plan is Triton's ({profile.name})"
        )
    plan = KernelPlan.uniform("triton", "Triton kernel")
    launch, reason = choose_experts(profile, shapes, shapes.expert_dtype or dtype)
    return replace(
        plan,
        grouped_gemm=Choice("triton", reason, launch),
        linear=Choice("reference", "the vendor's dense product, through torch"),
        gated_delta=_gated_delta(profile, dtype, "fla" in libraries),
        attention=_attention(profile, shapes, dtype, "flashinfer" in libraries),
        blocks=_one_by_one("a GPU computes while Python prepares what follows"),
    )


def _one_by_one(reason: str) -> Choice:
    return Choice("reference", f"operation by operation: {reason}")


def _gated_delta(profile: DeviceProfile, dtype: torch.dtype, has_fla: bool) -> Choice:
    if not has_fla:
        return Choice("triton", "Triton kernels; flash-linear-attention is not installed")
    if profile.compute_capability is None or profile.compute_capability < (8, 0):
        return Choice("triton", "Triton kernels; flash-linear-attention needs a GPU of sm_80 or later")
    if dtype not in (torch.bfloat16, torch.float16):
        return Choice("triton", f"Triton kernels; flash-linear-attention does not compute in {dtype}")
    return Choice("fla", "flash-linear-attention for prefills, Triton kernel for decodes")


def _attention(
    profile: DeviceProfile, shapes: KernelShapes, dtype: torch.dtype, has_flashinfer: bool
) -> Choice:
    launch = launch_for(profile.compute_capability, profile.num_multiprocessors, dtype, shapes.head_size)
    if not has_flashinfer:
        return Choice("triton", "Triton kernels; FlashInfer is not installed", launch)
    if profile.compute_capability is None or profile.compute_capability < (8, 0):
        return Choice("triton", "Triton kernels; FlashInfer needs a GPU of sm_80 or later", launch)
    if dtype not in (torch.bfloat16, torch.float16):
        return Choice("triton", f"Triton kernels; FlashInfer does not compute in {dtype}", launch)
    if shapes.head_size not in _FLASHINFER_HEADS:
        return Choice("triton", f"Triton kernels; FlashInfer has no heads of {shapes.head_size}", launch)
    return Choice("flashinfer", "FlashInfer")
