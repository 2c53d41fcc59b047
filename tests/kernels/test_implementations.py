"""The operations' tables: every name in them leads to a function that is there."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from importlib.util import find_spec
from pathlib import Path

import pytest

import moe_kernels


def _targets() -> list[str]:
    """All "module:function" of the tables in the operations' packages."""
    packages = [name for _, name, is_package in pkgutil.iter_modules(moe_kernels.__path__) if is_package]
    found = set()
    for package in packages:
        for value in vars(importlib.import_module(f"moe_kernels.{package}")).values():
            if isinstance(value, dict):
                found |= {
                    to for to in value.values() if isinstance(to, str) and to.startswith("moe_kernels.")
                }
    return sorted(found)


@pytest.mark.parametrize("target", _targets())
def test_an_implementation_that_a_table_names_exists(target: str) -> None:
    module, function = target.split(":")
    spec = find_spec(module)  # does not import it: not every machine has what it needs
    assert spec is not None, f"there is no module {module}"
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
