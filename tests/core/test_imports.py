"""Imports run one way: every floor of the package imports from the floors below it, and there is no circle.

Within a floor modules may import each other, as long as there is no circle.

Beside the floors stand backends and policies: they import from the floors up to dispatch and never from each other, and
no floor imports them but the top one: the registry finds them by name. Above everything stands benchmarks. The commands
import it inside of functions only, or for type checking, so that the library works and starts without it.
"""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT = Path(__file__).parents[2]
PACKAGE: Final = "moe_dispatch"

FLOORS: Final = (  # lowest first
    ("system",),  # the operating system; knows nothing of this package
    # what a layer is, how it is stored, and where it runs
    (
        "errors", "settings", "activations", "problem", "mxfp4", "numerics", "routers", "machine", "model_config",
        "stored_files", "checkpoints", "checkpoint_files", "checkpoint_scales", "checkpoint_sources",
        "checkpoint_mxfp4", "tensor_memory", "weight_checks", "layer_spec", "experts",
        "workloads",
    ),
    ("backend", "arrived_rows", "guard", "policy", "registry", "workspace"),  # what those are, and where they are found
    ("measure",),  # inputs, timing, verification
    ("dispatch",),  # from a call to a running backend
    ("parallel",),  # a layer whose experts are spread over ranks
    ("api",),  # the public functions
    ("", "cli", "commands", "integrations", "modules", "testing"),  # what people start; "" is the package itself
)  # fmt: skip
FLOOR: Final = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TOP: Final = len(FLOORS) - 1
BESIDE: Final = ("backends", "policies")
LINKED: Final = (*BESIDE, "benchmarks")
HIGHEST_FOR_BESIDE: Final = FLOOR["dispatch"]


@dataclasses.dataclass(frozen=True)
class Import:
    """A module that another one imports.

    Attributes:
        importer: Module name.
        imported: Module name.
        lazy: Whether importing the importer leaves it out: it stands inside of a function, or under TYPE_CHECKING.
    """

    importer: str
    imported: str
    lazy: bool

    def __str__(self) -> str:
        return f"{self.importer} -> {self.imported}"


def modules() -> dict[str, Path]:
    """Every module of the package by name; backends, policies and benchmarks through their links."""
    folders = [ROOT / PACKAGE, *(ROOT / PACKAGE / link for link in LINKED)]
    paths = {path for folder in folders for path in folder.rglob("*.py")}
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports() -> list[Import]:
    """All imports within the package. Those under TYPE_CHECKING count too: a reader follows them like the others."""
    names = modules()
    return [target for name, path in sorted(names.items()) for target in _imports_of(name, path, names)]


def _imports_of(name: str, path: Path, names: dict[str, Path]) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {inner for outer in ast.walk(tree) if _is_lazy(outer) for inner in ast.walk(outer)}
    for node in ast.walk(tree):
        targets: set[str] = set()
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            base = node.module or ""
            # `from package import module` imports the module, `from module import name` the module that has the name.
            targets = {full if (full := f"{base}.{alias.name}") in names else base for alias in node.names}
        elif isinstance(node, ast.Import):
            # `import moe_dispatch` alone, as for the package's folder, runs only what every import of a module runs.
            targets = {alias.name for alias in node.names} - {PACKAGE}
        for target in sorted(targets):
            top = target.partition(".")[0]
            assert top not in LINKED, f"{name} imports {target} under another name than moe_dispatch.{target}"
            if top == PACKAGE:
                yield Import(name, target, node in lazy)


def _is_lazy(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def room(module: str) -> str:
    """The module or folder directly below the package; empty for the package itself."""
    return module.removeprefix(PACKAGE).lstrip(".").partition(".")[0]


def is_allowed(edge: Import) -> bool:
    """Whether the floors permit an import."""
    importer, imported = room(edge.importer), room(edge.imported)
    if importer in (imported, "benchmarks"):
        return True
    if imported == "benchmarks":
        return importer == "commands" and edge.lazy
    if imported in BESIDE:
        return FLOOR.get(importer) == TOP
    limit = HIGHEST_FOR_BESIDE if importer in BESIDE else FLOOR[importer]
    return FLOOR[imported] <= limit


def test_every_module_has_a_floor() -> None:
    assert {room(name) for name in modules()} == {*FLOOR, *LINKED}


def test_imports_run_one_way() -> None:
    violations = [str(edge) for edge in imports() if not is_allowed(edge)]
    assert not violations, "imports against the order of the floors"


def test_there_is_no_circle() -> None:
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for edge in imports():
        # Importing a module runs its packages' __init__ as well. Only what the module itself says counts.
        graph[edge.importer].add(edge.imported)
    circle = find_circle(graph)
    assert not circle, "modules import each other: " + " -> ".join(circle)


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, its first module also the last; empty if there is none."""
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for imported in sorted(graph[module]):
            if circle := search(imported, [*path, module]):
                return circle
        done.add(module)
        return []

    return next((circle for module in sorted(graph) if (circle := search(module, []))), [])


def test_a_circle_is_found() -> None:
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})
