"""Tiles by (architecture, local experts, sizes, weights' type, rows an expert): data files.

A file holds `{"rows": [...]}` with the fields of TableKey and TableRow in each row; rows of one key stand by rising
`rows_per_expert`, the last without a bound.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moe_kernels.grouped_gemm.tiles import TileConfig
from moe_kernels.shapes import KernelShapes

# What experts' weights are called here; float16 has bfloat16's rows.
WEIGHTS = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "fp32": torch.float32}
NOT_TIMED = "compiled and inspected without a GPU; not timed on one"


@dataclass(frozen=True, slots=True, kw_only=True)
class TableKey:
    """What a set of rows is for."""

    local_experts: int
    hidden_size: int
    intermediate_size: int
    weights: str  # of WEIGHTS

    @classmethod
    def of(cls, shapes: KernelShapes, dtype: torch.dtype) -> TableKey:
        """The key of a rank whose experts' weights are `dtype`."""
        kind = "fp8" if dtype == torch.float8_e4m3fn else "bf16" if dtype.itemsize == 2 else "fp32"
        return cls(
            local_experts=shapes.num_local_experts,
            hidden_size=shapes.hidden_size,
            intermediate_size=shapes.moe_intermediate_size,
            weights=kind,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """What runs for up to so many rows an expert."""

    rows_per_expert: float | None  # on average; None: any number
    regime: str  # of REGIMES
    gate_up: TileConfig
    down: TileConfig
    source: str = NOT_TIMED  # "timed on NVIDIA H100 80GB HBM3"


def load_rows(architecture: str, key: TableKey) -> list[TableRow]:
    """The shipped rows of a key; [] where there are none."""
    return [_row(row) for row in _file_rows(_folder() / f"{architecture}.json") if _key(row) == key]


def load_table(architecture: str) -> dict[TableKey, list[TableRow]]:
    """All that is shipped for an architecture; {} where there is nothing."""
    keys = dict.fromkeys(_key(row) for row in _file_rows(_folder() / f"{architecture}.json"))
    return {key: load_rows(architecture, key) for key in keys}


def save_rows(architecture: str, key: TableKey, rows: Sequence[TableRow]) -> Path:
    """Replace the rows of a key in an architecture's file, which is returned."""
    path = _folder() / f"{architecture}.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in kept if _key(row) != key] + [asdict(key) | asdict(row) for row in rows]
    kept.sort(key=lambda row: (row["weights"], -row["local_experts"], row["rows_per_expert"] or float("inf")))
    lines = ",\n".join(json.dumps(row) for row in kept)
    path.write_text(f'{{"rows": [\n{lines}\n]}}\n')
    _file_rows.cache_clear()
    return path


def _folder() -> Path:
    return Path(__file__).parent / "tables"


@functools.cache
def _file_rows(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["rows"] if file.is_file() else []


def _key(row: dict[str, Any]) -> TableKey:
    return TableKey(**{name: row[name] for name in TableKey.__slots__})


def _row(row: dict[str, Any]) -> TableRow:
    values = {name: row[name] for name in TableRow.__slots__}
    return TableRow(**{**values, "gate_up": TileConfig(**row["gate_up"]), "down": TileConfig(**row["down"])})
