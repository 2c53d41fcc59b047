"""Tests of Triton kernels alone, for Triton's interpreter, which has to be chosen before triton is imported.

Run them with `TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 python -m pytest tests/kernels/interpreted`; the default
suite does, in processes of their own (`test_interpreted.py`). On a GPU, `tests/gpu/test_operations.py` runs them.
"""

from __future__ import annotations

import os

_WANTED = os.environ.get("TRITON_INTERPRET") == "1" or "MOE_TEST_DEVICE" in os.environ
collect_ignore_glob = [] if _WANTED else ["test_*.py"]
