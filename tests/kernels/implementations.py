"""Running a file's tests once for each implementation of an operation that this machine has, or number of threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from moe_kernels.device import DeviceProfile
from moe_kernels.native.build import NativeBuildError
from moe_kernels.native.library import native_library
from moe_kernels.select import cpu_levels
from tests.kernels.packing import TOLERANCE


def _compiled() -> list[str]:
    try:
        native_library()
    except NativeBuildError:
        return []
    return [f"cpu:{level}" for level in cpu_levels(DeviceProfile.query())]


# Under Triton's interpreter or on another device (see tests/gpu), its kernels and nothing else; they compute in float32
# at most.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TRITON_ALONE = INTERPRETED or "MOE_TEST_DEVICE" in os.environ
IMPLEMENTATIONS = ["triton"] if _TRITON_ALONE else ["reference", *_compiled()]
NATIVE = [name for name in IMPLEMENTATIONS if name.startswith("cpu:")]
DTYPES = [dtype for dtype in TOLERANCE if not (_TRITON_ALONE and dtype == torch.float64)]


def every_implementation(*operations: Callable[..., Any]) -> Any:
    """An autouse fixture: calls of `operations` that name no implementation run each one in turn."""

    @pytest.fixture(autouse=True, params=IMPLEMENTATIONS)
    def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        for operation in operations:
            defaults = operation.__kwdefaults__
            assert defaults is not None
            monkeypatch.setitem(defaults, "implementation", request.param)
        return request.param

    return implementation


def on_threads(*numbers: int) -> Any:
    """An autouse fixture: every test with each number of threads."""

    @pytest.fixture(autouse=True, params=numbers)
    def threads(request: pytest.FixtureRequest) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(request.param)
        yield
        torch.set_num_threads(before)

    return threads
