"""The order of the imports and the names of the definitions, read from the source of every file.

A layer imports nothing from a higher one. To add a package under blockgpt/, add it to LAYERS.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

Sources = dict[str, str]  # path from the root -> text
Import = tuple[str, int, bool]  # module, line, whether it runs when the file is imported

# From the lowest to the highest. A module imports from its own layer and lower ones only.
LAYERS = (
    ("blockgpt.startup", "blockgpt.errors", "blockgpt.files", "blockgpt.console", "blockgpt.progress",
     "blockgpt.config_fields", "blockgpt.config_aliases", "blockgpt.config_effects"),
    ("blockgpt.data", "blockgpt.kernels"),
    ("blockgpt.training",),
    ("blockgpt.checkpoints", "blockgpt.huggingface"),
    ("blockgpt.accounting", "blockgpt.experiments", "blockgpt.posttraining"),
    ("root",),
    ("tools", "data"),  # tools/ and data/<name>/prepare.py
)
WRITING_DATA = {f"blockgpt.data.{name}" for name in ("sources", "paths", "readers", "hub", "filters", "writer",
                                                   "prepare", "commands")}
READING_DATA = {f"blockgpt.data.{name}" for name in ("loader", "packing", "mixture")}

IMPORTERS = ("import_module", "__import__", "resolve_name")  # their first argument is a module
LAZY_IMPORTERS = ("LazyModule",)  # the same, at the first use

RETIRED_NAMES = {
    "Sight", "Watch", "Machine", "told_in_one_line", "on_main", "is_main", "exchange", "slopes", "reach", "settle",
    "placed", "boxes", "scramble", "spare", "tallied", "publish", "trust", "facts", "gathered", "middle", "folded",
    "moments", "piece", "pieces", "part", "parts", "kind", "kinds", "room", "rooms", "told", "stands", "mend", "share",
    "shares", "begun", "home", "all_know", "agree", "beat", "number", "numbers", "machine", "leave", "fill", "locked",
    "served", "written", "built", "made", "kept", "said", "shown", "mine", "there", "together", "alike", "begun_before",
    "reckon", "view",
}
PER_COMMAND = {"main", "parse_args"}  # every command has these


def read_sources(root: Path) -> Sources:
    """Every Python file of the tree that is no test."""
    patterns = ("*.py", "config/*.py", "blockgpt/**/*.py", "tools/**/*.py", "data/*/*.py")
    return {path.relative_to(root).as_posix(): path.read_text() for pattern in patterns
            for path in sorted(root.glob(pattern))}


@functools.cache
def parse(text: str) -> ast.Module:
    return ast.parse(text)


def module_name(path: str) -> str:
    """blockgpt/data/loader.py -> blockgpt.data.loader; a package is named by its folder."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def layer(module: str) -> int:
    """The index in LAYERS of a module of the tree."""
    for index, prefixes in enumerate(LAYERS):
        if any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes):
            return index
    assert not module.startswith("blockgpt."), f"{module} is in none of LAYERS"
    return 0 if module == "blockgpt" else LAYERS.index(("root",))


def imported_names(node: ast.AST, package: str) -> Iterator[str]:
    """The dotted names that a statement or call imports, the longest possible; `package` is that of its file."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parents = package.split(".")[:len(package.split(".")) + 1 - node.level] if node.level else []
        origin = ".".join([*parents, *filter(None, [node.module])])
        yield from (f"{origin}.{alias.name}" for alias in node.names)
    elif called_name(node) in (*IMPORTERS, *LAZY_IMPORTERS):
        argument = next(iter(node.args), None)
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            yield argument.value.replace(":", ".")


def called_name(node: ast.AST) -> str | None:
    """The name of the function that a call calls, without its module; None for another node."""
    function = getattr(node, "func", None)
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)


@functools.cache
def find_imports(path: str, text: str, modules: frozenset[str]) -> list[Import]:
    """Every import of one of the modules in a file: statements and importlib, at module level and in functions."""
    package = module_name(path) if path.endswith("__init__.py") else module_name(path).rpartition(".")[0]
    found = []

    def visit(node: ast.AST, runs: bool) -> None:
        for name in imported_names(node, package):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name:
                found.append((name, getattr(node, "lineno", 0), runs and called_name(node) not in LAZY_IMPORTERS))
        runs = runs and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            runs = False
        for child in ast.iter_child_nodes(node):
            visit(child, runs)

    visit(parse(text), True)
    return found


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one import cycle, or an empty list."""
    done: set[str] = set()

    def search(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module):], module]
        if module in done:
            return []
        for target in sorted(graph.get(module, ())):
            if cycle := search(target, [*trail, module]):
                return cycle
        done.add(module)
        return []

    return next(filter(None, (search(module, []) for module in sorted(graph))), [])


def reachable(module: str, graph: dict[str, set[str]]) -> set[str]:
    """The modules that a module imports, directly or through others."""
    seen: set[str] = set()
    queue = [module]
    while queue:
        targets = graph.get(queue.pop(), set()) - seen
        seen |= targets
        queue += targets
    return seen


def import_problems(sources: Sources) -> list[str]:
    """One line for every import that runs against the order."""
    problems = []
    graph: dict[str, set[str]] = {}
    at_import: dict[str, set[str]] = {}
    modules = frozenset(map(module_name, sources))
    for path, text in sources.items():
        module = module_name(path)
        for target, line, runs in find_imports(path, text, modules):
            graph.setdefault(module, set()).add(target)
            if runs and target != module:
                at_import.setdefault(module, set()).add(target)
            if layer(target) > layer(module):
                problems.append(f"{path}:{line}: imports {target} of a higher layer")
            if target == "train":
                problems.append(f"{path}:{line}: imports train")
    for side, other in ((WRITING_DATA, READING_DATA), (READING_DATA, WRITING_DATA)):
        for module in sorted(side):
            problems += [f"{module} imports {target} of the other side" for target in
                         sorted(reachable(module, graph) & other)]
    if cycle := find_cycle(at_import):
        problems.append(f"import cycle: {' -> '.join(cycle)}")
    for path, text in sources.items():
        if path.endswith("__init__.py") and path.startswith(("blockgpt/", "tools/")) and text:
            problems.append(f"{path}: is not empty")
    return problems


@pytest.fixture(scope="module")
def tree() -> Sources:
    return read_sources(ROOT)


def test_imports_run_one_way(tree):
    assert import_problems(tree) == []


def test_no_test_imports_train():
    tests = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    for path, text in tests.items():
        names = {name for node in ast.walk(ast.parse(text)) for name in imported_names(node, "")}
        assert not {name for name in names if name.split(".")[0] == "train"}, path


def test_the_tables_name_modules_of_the_tree(tree):
    modules = {module_name(path) for path in tree}
    assert modules >= WRITING_DATA | READING_DATA | {"train", "blockgpt.data.dataset", "tools", "data.pycode.prepare"}
    assert modules >= set(LAYERS[0])


@pytest.mark.parametrize("path, statement, problem", [
    ("blockgpt/files.py", "import configurator", "imports configurator of a higher layer"),
    ("blockgpt/errors.py", "from blockgpt.data import loader", "imports blockgpt.data.loader of a higher layer"),
    ("blockgpt/data/loader.py", "def f():\n    from blockgpt.training import launch",
     "imports blockgpt.training.launch of a higher layer"),
    ("blockgpt/data/loader.py", "from ..training.launch import init",
     "imports blockgpt.training.launch of a higher layer"),
    ("blockgpt/training/faults.py", "import importlib\nimportlib.import_module('blockgpt.accounting.flops')",
     "imports blockgpt.accounting.flops of a higher layer"),
    ("blockgpt/training/faults.py", "class A:\n    def f(self):\n        return __import__('model_builder')",
     "imports model_builder of a higher layer"),
    ("blockgpt/accounting/flops.py", "import pkgutil\npkgutil.resolve_name('model_config:ModelConfig')",
     "imports model_config of a higher layer"),
    ("blockgpt/data/writer.py", "class LazyModule: pass\nmodule = LazyModule('model_components')",
     "imports model_components of a higher layer"),
    ("blockgpt/console.py", "import typing\nif typing.TYPE_CHECKING:\n    from configurator import Config",
     "imports configurator of a higher layer"),
    ("model_config.py", "from tools import demo", "imports tools.demo of a higher layer"),
    ("sample.py", "import data.pycode.prepare", "imports data.pycode.prepare of a higher layer"),
    ("tools/demo.py", "def f():\n    from train import train", "imports train"),
    ("blockgpt/data/dataset.py", "def f():\n    import blockgpt.data.writer",
     "blockgpt.data.loader imports blockgpt.data.writer of the other side"),  # through dataset
    ("blockgpt/data/sources.py", "from blockgpt.data.packing import PackedBatches",
     "blockgpt.data.sources imports blockgpt.data.packing of the other side"),
    ("blockgpt/errors.py", "import blockgpt.console", "blockgpt.console -> blockgpt.errors"),
    ("blockgpt/data/__init__.py", "import numpy", "blockgpt/data/__init__.py: is not empty"),
])
def test_a_wrong_import_is_found(tree, path, statement, problem):
    planted = {**tree, path: f"{tree[path]}\n{statement}\n"}
    assert any(problem in line for line in set(import_problems(planted)) - set(import_problems(tree)))


def test_an_import_in_a_function_makes_no_cycle(tree):
    path = "blockgpt/errors.py"
    planted = {**tree, path: f"{tree[path]}\ndef f():\n    import blockgpt.console\n"}
    assert not any("cycle" in line for line in import_problems(planted))


# Names


def definitions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(name, line) of every function, class, parameter, variable and assigned attribute."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            yield node.name, node.lineno
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname, node.lineno) for alias in node.names if alias.asname)


def shared_names(sources: Sources) -> dict[str, set[str]]:
    """{name: modules} of the functions and classes that several modules define."""
    modules: dict[str, set[str]] = {}
    for path, text in sources.items():
        for node in parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name not in PER_COMMAND:
                modules.setdefault(node.name, set()).add(module_name(path))
    return {name: found for name, found in modules.items() if len(found) > 1}


def test_a_function_or_class_is_defined_in_one_module(tree):
    assert shared_names(tree) == {}
    planted = {**tree, "sample.py": f"{tree['sample.py']}\ndef write_json(): pass\ndef main(): pass\n"}
    assert shared_names(planted) == {"write_json": {"sample", "blockgpt.files"}}


def test_no_definition_has_a_retired_name(tree):
    found = [f"{path}:{line}: {name}" for path, text in tree.items() if not path.startswith(("data/", "config/"))
             for name, line in definitions(parse(text)) if name in RETIRED_NAMES]
    assert found == []


@pytest.mark.parametrize("statement", [
    "def settle(): pass", "class Watch: pass", "def f(kind=3): pass", "def f(*, share): pass", "lambda part: 3",
    "pieces = 3", "for part in (): pass", "[kind for kind in ()]", "self.home = 3", "with f() as told: pass",
    "class A:\n    parts: int = 3", "import math as middle", "if (reach := 3): pass", "a, (b, *rooms) = 3",
    "try: pass\nexcept ValueError as facts: pass", "async def beat(): pass",
])
def test_a_retired_name_is_found_wherever_it_is_defined(statement):
    assert {name for name, _ in definitions(ast.parse(statement))} & RETIRED_NAMES


# ---- lookups

# `os.path.exists`, `glob` and the like take what may not be read for what is not there. blockgpt/files.py does not.
TWO_ANSWERS = {"exists", "is_dir", "is_file", "isdir", "isfile", "lexists", "glob", "iglob", "rglob", "iterdir",
               "listdir", "scandir", "walk"}
MAY_LOOK = {
    "blockgpt/files.py": "it is where the three answers are",
    "blockgpt/startup.py": "which advice an error gives",
    "blockgpt/data/paths.py": "its own lookups are refused one by one",
    "blockgpt/data/hub.py": "files that a library has stored",
    "data/pycode/prepare.py": "os.walk, with an onerror that refuses",
    "tools/mutate.py": "files of its own copy of the tree",
    "tools/torture/files.py": "files that the trial has made", "tools/torture/ranks.py": "the same",
    "tools/torture/runs.py": "the same", "tools/torture/network.py": "devices", "tools/torture/__main__.py": "the same"}


def lookups_with_two_answers(text: str) -> list[str]:
    """The calls of a method or of a function of os, os.path or glob that cannot say that they do not know."""
    return [f"{node.lineno}: {node.func.attr}" for node in ast.walk(parse(text))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in TWO_ANSWERS
            and ast.unparse(node.func) != "ast.walk"]


def test_every_lookup_of_a_file_has_three_answers(tree):
    found = {path: lookups_with_two_answers(text) for path, text in tree.items()}
    assert {path for path, calls in found.items() if calls} <= set(MAY_LOOK), found
    planted = "import os\nif os.path.exists('x') or Path('x').is_dir():\n    glob.glob('*')"
    assert lookups_with_two_answers(planted) == ["2: exists", "2: is_dir", "3: glob"]


def test_every_thread_is_asked_how_it_ended(tree):
    """A plain `threading.Thread` prints its exception, and the program exits with code 0."""
    found = {path for path, text in tree.items() if "threading.Thread(" in text}
    assert found == {"blockgpt/training/tracker.py",  # warns of every error of its threads
                     "blockgpt/data/prepare.py",  # ends the process
                     "tools/torture/runs.py"}
