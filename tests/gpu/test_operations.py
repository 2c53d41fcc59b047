"""The tests of the Triton kernels, which the default suite runs in the interpreter, on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.test_interpreted import FILES, check, run_pytest

pytestmark = pytest.mark.gpu

# Of the interpreter itself; run on the GPU by test_model.py and test_tables.py; of an adapter, with a stand-in for the
# library.
_ELSEWHERE = ("test_repair", "test_triton_model", "test_tables", "test_attention_flashinfer")
# They put something else in a library's place, or would copy 13 GB there and back.
_DESELECTED = "not fla and not flashinfer and not 32_bits"


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.stem not in _ELSEWHERE], ids=lambda file: file.stem
)
def test_operations(file: Path) -> None:
    env = {"TRITON_INTERPRET": "0", "MOE_TEST_DEVICE": "cuda"}
    check(run_pytest(env, "-m", "not gpu", "-k", _DESELECTED, str(file)))
