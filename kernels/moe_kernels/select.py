"""KernelPlan: which implementation of each operation a rank runs, chosen from its DeviceProfile, and why."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from moe_kernels.device import DeviceProfile

FAMILIES = ("auto", "reference")
_FAMILIES_TO_COME = ("triton", "cpu")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True)
class Choice:
    """The implementation chosen for one operation."""

    implementation: str  # a name in that operation's table
    reason: str  # one sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelPlan:
    """One choice for each operation; set once by `select`, read by the layers' constructors."""

    grouped_gemm: Choice
    routing: Choice
    gated_delta: Choice
    conv: Choice
    attention: Choice
    norm: Choice

    @classmethod
    def reference(cls, reason: str = "asked for") -> KernelPlan:
        """Plain torch everywhere: what tests compare with, and what inspection builds a model with."""
        return cls(**{field.name: Choice("reference", reason) for field in fields(cls)})

    def describe(self) -> str:
        """One line for each operation: its name, the implementation and the reason."""
        choices = {field.name: getattr(self, field.name) for field in fields(self)}
        width = max(map(len, choices))
        return "\n".join(f"{name:<{width}}  {c.implementation}: {c.reason}" for name, c in choices.items())


def select(profile: DeviceProfile, dtype: torch.dtype, family: str = "auto") -> KernelPlan:
    """The plan for a device of this profile that computes in `dtype`.

    Raises ValueError for a family or a dtype that there are no kernels for.
    """
    if family in _FAMILIES_TO_COME:
        raise ValueError(
            f"kernel family is {family!r}, which this version does not have yet; use one of {list(FAMILIES)}"
        )
    if family not in FAMILIES:
        raise ValueError(f"kernel family is {family!r}; wanted one of {list(FAMILIES)}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype}; the kernels compute in {', '.join(map(str, _DTYPES))}")
    if family == "reference":
        return KernelPlan.reference(f"plain torch on {profile.kind}, forced by the kernel family 'reference'")
    return KernelPlan.reference(
        f"plain torch on {profile.kind}: this version has no other implementation of the operation"
    )
