"""What has to be in place before a kernel runs: Triton's interpreter mended, or tensors moved to the device tested."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.kernels.interpreted import repair

    repair.install()

if os.environ.get("MOE_TEST_DEVICE"):
    from tests.gpu import on_device

    on_device.install(os.environ["MOE_TEST_DEVICE"])
