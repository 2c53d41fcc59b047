"""Imports go downward only: the floors of the three packages, and no circular import."""

from __future__ import annotations

import pytest

from tests.import_graph import FACADE, Import, ImportGraph, read_graph
from tests.source_tree import find_modules

# From the ground up. A name stands for a module, or for a package with all that is in it. A module may import
# from its own layer and from those above it in this list; each module is in exactly one layer. The package
# moe_runtime itself is in none: it runs before all its modules and so imports nothing, and the public names that
# it hands out on demand count as imports of the modules they come from.
LAYERS = [
    # operations on tensors, what a device is, which kernel suits it
    "moe_kernels",
    # modules of models; what they need from outside, as protocols
    "moe_models",
    # plain data: what a user may ask for and get back, and every error
    "moe_runtime.errors",
    "moe_runtime.arguments",
    "moe_runtime.structured_outputs",
    "moe_runtime.config moe_runtime.sampling_params moe_runtime.modelfiles moe_runtime.quantization",
    "moe_runtime.request",
    "moe_runtime.observer",
    # OpenAI's API from the other side: a client of any server, files of requests
    "moe_runtime.openai_client moe_runtime.batch_file",
    # sockets between drivers and ranks
    "moe_runtime.transport",
    # what the system says: whether an address answers, what a signal ends
    "moe_runtime.reachable moe_runtime.signals",
    # Ray itself: starting it, what the cluster has, placement groups
    "moe_runtime.connecting moe_runtime.cluster",
    # which class serves a model, and what it says of itself
    "moe_runtime.registry",
    "moe_runtime.inspection",
    # the parts of a rank, each knowing nothing of the others
    "moe_runtime.tokenizer",
    "moe_runtime.weights",
    "moe_runtime.cache",
    "moe_runtime.experts",
    "moe_runtime.timing",
    "moe_runtime.parallel",
    "moe_runtime.sampling",
    "moe_runtime.grammar",
    # a rank: what runs in the next step, running it, and the actor around that
    "moe_runtime.scheduler",
    "moe_runtime.batching moe_runtime.runner",
    "moe_runtime.gpu_checks",
    "moe_runtime.building moe_runtime.delivery moe_runtime.memory moe_runtime.profiling moe_runtime.rank_spec",
    "moe_runtime.warmup",
    "moe_runtime.step_loop moe_runtime.probe",
    "moe_runtime.worker",
    # the driver: all ranks at once, and what the user sees of them
    "moe_runtime.ranks moe_runtime.routing",
    "moe_runtime.client",
    "moe_runtime.engine",
    "moe_runtime.deployment",
    "moe_runtime.named",
    "moe_runtime.status",
    "moe_runtime.outputs moe_runtime.progress",
    "moe_runtime.frontend",
    "moe_runtime.metrics",
    # the faces
    "moe_runtime.llm moe_runtime.async_llm",
    "moe_runtime.server",
    "moe_runtime.bench",
    "moe_runtime.simulate",
    "moe_runtime.cli",
    "moe_runtime.__main__",
]

# What a package or module has no business with, however indirectly it gets there when imported.
BANNED = {
    "moe_kernels": {"ray", "transformers"},
    "moe_models": {"ray", "transformers"},
    "moe_runtime.errors": {"ray", "torch"},
    "moe_runtime.request": {"ray", "torch", "xgrammar"},
    "moe_runtime.grammar.checker": {"ray", "torch", "xgrammar"},
    "moe_runtime.scheduler": {"ray", "torch"},
    "moe_runtime.inspection": {"torch"},
    "moe_runtime.engine": {"torch"},
    "moe_runtime.llm": {"torch", "xgrammar"},
    "moe_runtime.server.parsers": {"fastapi", "pydantic", "ray", "torch"},
    "moe_runtime.metrics": {"torch"},
    "moe_runtime.simulate": {"matplotlib", "ray", "torch"},
    "moe_runtime.bench.serving": {"ray", "torch"},
}


def _is_in(module: str, name: str) -> bool:
    return module == name or module.startswith(name + ".")


def _floors(graph: ImportGraph, layers: list[str]) -> dict[str, list[int]]:
    """Numbers of the layers that each module is in: exactly one, if all is well."""
    return {
        module: [i for i, layer in enumerate(layers) if any(_is_in(module, name) for name in layer.split())]
        for module in sorted(graph.modules - {FACADE})
    }


def find_misplaced(graph: ImportGraph, layers: list[str]) -> list[str]:
    """Modules in no layer or in several, and names in the table that no module has."""
    names = [name for layer in layers for name in layer.split()]
    strays = [
        f"{m} is in layers {floors}" for m, floors in _floors(graph, layers).items() if len(floors) != 1
    ]
    stale = [f"no module {name}" for name in names if not any(_is_in(m, name) for m in graph.modules)]
    return strays + stale


def find_upward(graph: ImportGraph, layers: list[str]) -> list[str]:
    """Imports of any kind, TYPE_CHECKING blocks and functions included, from a layer above the importer's."""
    floor = {module: floors[0] for module, floors in _floors(graph, layers).items() if floors}
    return [
        f"{i.importer}:{i.line} imports {i.imported}"
        for i in sorted(graph.imports)
        if i.importer in floor and i.imported in floor and floor[i.imported] > floor[i.importer]
    ]


def find_cycle(graph: ImportGraph) -> list[str]:
    """Modules of one circular import made at module level, the first again at the end; empty if there is none."""
    finished: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in finished:
            for imported in graph.loads(module):
                if cycle := search(imported, [*path, module]):
                    return cycle
            finished.add(module)
        return []

    return next((cycle for module in sorted(graph.modules) if (cycle := search(module, []))), [])


@pytest.fixture(scope="module")
def graph() -> ImportGraph:
    return read_graph({name: file.read_text() for name, file in find_modules().items()})


def test_every_module_is_in_exactly_one_layer(graph: ImportGraph) -> None:
    assert find_misplaced(graph, LAYERS) == [], "put each module into one line of LAYERS, at its floor"


def test_no_import_goes_upward(graph: ImportGraph) -> None:
    assert find_upward(graph, LAYERS) == []


def test_no_import_is_circular(graph: ImportGraph) -> None:
    assert " -> ".join(find_cycle(graph)) == ""


def test_the_package_itself_imports_nothing(graph: ImportGraph) -> None:
    assert graph.loads(FACADE) == []


@pytest.mark.parametrize("name", sorted(BANNED))
def test_what_may_not_be_imported_even_indirectly(graph: ImportGraph, name: str) -> None:
    members = [module for module in graph.modules if _is_in(module, name)]
    assert members
    for module in members:
        found = {external.split(".")[0] for external in graph.loads_indirectly(module) - graph.modules}
        assert found & BANNED[name] == set(), module


def test_the_graph_holds_imports_of_every_kind() -> None:
    graph = read_graph(
        {
            "moe_runtime": "if TYPE_CHECKING:\n    from moe_runtime.llm import LLM",
            "moe_runtime.llm": "import numpy.typing",
            "moe_runtime.cli": "",
            "moe_runtime.cli.main": (
                "from typing import TYPE_CHECKING\n"
                "from moe_runtime import cli, __version__, LLM\n"
                "from . import other\n"
                "if TYPE_CHECKING:\n    import moe_runtime.a as a\n"
                "try:\n    from moe_runtime.b import c\nexcept ImportError:\n    pass\n"
                "class C:\n    def f(self):\n        from ..d.e import g\n"
            ),
            "moe_runtime.cli.other": "",
            "moe_runtime.a": "",
            "moe_runtime.b": "",
            "moe_runtime.d": "",
            "moe_runtime.d.e": "",
        }
    )
    in_main = {i for i in graph.imports if i.importer == "moe_runtime.cli.main"}

    assert {i.imported for i in in_main if i.when == "loading"} == {
        "typing.TYPE_CHECKING",
        "moe_runtime.cli",
        "moe_runtime",
        "moe_runtime.llm",
        "moe_runtime.cli.other",
        "moe_runtime.b",
    }
    assert {i.imported for i in in_main if i.when == "checking types"} == {"moe_runtime.a"}
    assert {i.imported for i in in_main if i.when == "called"} == {"moe_runtime.d", "moe_runtime.d.e"}
    assert Import("moe_runtime.cli.main", "moe_runtime.d.e", 12, "called") in in_main
    assert graph.loads_indirectly("moe_runtime.cli.main") >= {"moe_runtime.llm", "numpy.typing"}


@pytest.mark.parametrize(
    "source",
    [
        "from top import x",
        "import top.inner",
        "def f():\n    import top",
        "if TYPE_CHECKING:\n    from top import inner",
    ],
)
def test_an_upward_import_is_found(source: str) -> None:
    graph = read_graph({"bottom": source, "top": "import bottom", "top.inner": ""})

    assert find_upward(graph, ["top", "bottom"]) == ["top:1 imports bottom"]
    assert find_upward(graph, ["bottom", "top"])
    assert all(found.startswith("bottom:") for found in find_upward(graph, ["bottom", "top"]))


def test_modules_outside_the_table_are_found() -> None:
    graph = read_graph({"a": "", "b": "", "b.c": ""})

    assert find_misplaced(graph, ["a", "b"]) == []
    assert find_misplaced(graph, ["a"]) == ["b is in layers []", "b.c is in layers []"]
    assert find_misplaced(graph, ["a", "b", "b.c"]) == ["b.c is in layers [1, 2]"]
    assert find_misplaced(graph, ["a b", "gone"]) == ["no module gone"]


def test_a_circular_import_is_found_unless_it_is_deferred() -> None:
    circle = {"a": "import b", "b": "from c import x", "c": "import a", "d": "import a"}

    assert find_cycle(read_graph(circle)) == ["a", "b", "c", "a"]
    assert find_cycle(read_graph({**circle, "c": "def f():\n    import a"})) == []
    assert find_cycle(read_graph({**circle, "c": "if TYPE_CHECKING:\n    import a"})) == []
    # Importing a module runs the package it is in.
    assert find_cycle(read_graph({"p": "import q", "p.m": "", "q": "import p.m"})) == ["p", "q", "p"]
