"""Who imports whom, read from source text with nothing imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

FACADE = "moe_runtime"

When = Literal["loading", "called", "checking types"]


@dataclass(frozen=True, order=True, slots=True)
class Import:
    """One module's need of another, ours or not."""

    importer: str
    imported: str
    line: int
    when: When


@dataclass(frozen=True)
class ImportGraph:
    """Imports among `modules`, and of what is outside them."""

    modules: frozenset[str]
    imports: frozenset[Import]

    def loads(self, module: str) -> list[str]:
        """Modules of ours that are executed when `module` is."""
        return sorted(self.modules.intersection(self._loads.get(module, ())))

    def loads_indirectly(self, module: str) -> set[str]:
        """Everything that is loaded with `module`: ours all the way down, and what is outside by name."""
        reached: set[str] = set()
        waiting = [module]
        while waiting:
            for imported in self._loads.get(waiting.pop(), set()) - reached:
                reached.add(imported)
                waiting.append(imported)
        return reached

    @cached_property
    def _loads(self) -> dict[str, set[str]]:
        loads: dict[str, set[str]] = {}
        for found in self.imports:
            if found.when == "loading":
                loads.setdefault(found.importer, set()).add(found.imported)
        return loads


def read_graph(sources: Mapping[str, str]) -> ImportGraph:
    """The graph of these modules, source text by dotted name.

    Importing a module also executes the packages it lies in, so these count as imported, but for packages that
    the importer itself is in: those are executed, or being executed, already. A public name taken from the facade
    counts as an import of the module that it comes from.
    """
    facade = ast.parse(sources.get(FACADE, ""))
    homes = {
        f"{FACADE}.{alias.asname or alias.name}": node.module
        for node in ast.walk(facade)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    imports = {
        Import(importer, imported, node.lineno, when)
        for importer, source in sources.items()
        for node, when in _import_statements(ast.parse(source), "loading")
        for name in _names(node, importer, is_package=any(m.startswith(importer + ".") for m in sources))
        for target in (name, homes.get(name, name))
        for imported in _executed(target, importer, sources)
    }
    return ImportGraph(frozenset(sources), frozenset(imports))


def _import_statements(node: ast.AST, when: When) -> Iterator[tuple[ast.Import | ast.ImportFrom, When]]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, when
    elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        for child in node.body:
            yield from _import_statements(child, "checking types")
        for child in node.orelse:
            yield from _import_statements(child, when)
    else:
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from _import_statements(child, "called" if is_function and when == "loading" else when)


def _names(node: ast.Import | ast.ImportFrom, importer: str, *, is_package: bool) -> Iterator[str]:
    """What a statement names, absolute: modules, or attributes of modules (`from module import attribute`)."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        parts = importer.split(".")
        package = parts[: len(parts) - node.level + is_package]
        base = ".".join([*package, *filter(None, [node.module])])
    yield from (f"{base}.{alias.name}" for alias in node.names)


def _executed(name: str, importer: str, sources: Mapping[str, str]) -> Iterator[str]:
    """Modules that have to be executed to get at `name`; what is not ours is taken as it is named."""
    parts = name.split(".")
    prefixes = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    ours = [prefix for prefix in prefixes if prefix in sources]
    if not ours:
        yield name
    for module in ours:
        if module == ours[-1] or not f"{importer}.".startswith(f"{module}."):
            yield module
