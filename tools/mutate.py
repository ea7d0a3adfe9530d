"""Mutation testing: change one expression or statement of a module, and see whether its tests fail.

    python -m tools.mutate --sample 100 --output mutants.jsonl       100 mutants of all modules, drawn with --seed
    python -m tools.mutate --module blockgpt/training/optimizers.py  every mutant of one module
    python -m tools.mutate --output mutants.jsonl --report           the score and the survivors of a file, run nothing

The tree is copied first, so the working tree does not change. Each mutant is tested in a process forked from this one,
which has torch and pytest loaded, with -x and a time limit. A line is appended to --output for each mutant; the same
command continues after an interruption. docs/TESTING.md has the last score and the reason of every survivor.
To add a module: a line in TESTS. To add a kind of mutant: a method of `Mutator`.
"""

import ast
import contextlib
import dataclasses
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
from blockgpt.console import ArgumentParser
from blockgpt.errors import DataError, UserError, did_you_mean, exit_on_user_error
from blockgpt.files import user_path

ROOT = Path(__file__).resolve().parent.parent

CHECKPOINT_TESTS = ("tests/checkpoints/test_checkpoint.py", "tests/checkpoints/test_files.py",
                    "tests/checkpoints/test_manager.py", "tests/checkpoints/test_saver.py")
INFER_TEST = "tests/model/test_builder.py::test_infer_config_is_the_config_of_every_preset"
# module: the tests that are to notice a wrong line in it, those most likely to come first.
TESTS: dict[str, tuple[str, ...]] = {
    "train.py": ("tests/test_golden_run.py", "tests/test_train.py"),
    "blockgpt/training/objectives.py": ("tests/training/test_objectives.py", "tests/data/test_packing.py",
                                        "tests/data/test_mixture.py", "tests/test_golden_run.py",
                                        "tests/training/test_second_objective.py"),
    "blockgpt/training/optimizers.py": ("tests/training/test_optimizers.py", "tests/test_golden_run.py"),
    "blockgpt/training/diagnostics.py": ("tests/training/test_diagnostics.py", "tests/test_golden_run.py",
                                         "tests/test_train.py"),
    "blockgpt/checkpoints/checkpoint.py": CHECKPOINT_TESTS,
    "blockgpt/checkpoints/manager.py": (*CHECKPOINT_TESTS[::-1], "tests/test_golden_run.py"),
    "blockgpt/checkpoints/saver.py": CHECKPOINT_TESTS[::-1],
    "blockgpt/data/loader.py": ("tests/data/test_loader.py", "tests/data/test_dataset.py"),
    "blockgpt/data/writer.py": ("tests/data/test_writer.py", "tests/data/test_prepare.py"),
    "blockgpt/data/tokenizer.py": ("tests/data/test_tokenizer.py", "tests/tools/test_train_tokenizer.py"),
    "model_components.py": ("tests/model/test_components.py", "tests/accounting/test_flops.py",
                            "tests/kernels/test_linear_cross_entropy.py", "tests/model/test_presets.py", INFER_TEST),
    "model_attention.py": ("tests/model/test_attention.py", "tests/accounting/test_flops.py",
                           "tests/model/test_components.py", "tests/model/test_seams.py",
                           "tests/model/test_presets.py", INFER_TEST),
    "model_positions.py": ("tests/model/test_positions.py", "tests/model/test_presets.py", INFER_TEST),
    "model_init.py": ("tests/model/test_init.py", "tests/model/test_builder.py"),
    "model_builder.py": ("tests/test_golden_run.py", "tests/test_sample.py", "tests/model/test_components.py",
                         "tests/model/test_builder.py"),
}
MARKERS = "not long and not slow"  # the tests of a mutant, as `make test-quick` selects them
SLOW_MARKERS = "slow and not long"  # with --slow, the tests of a mutant that survives these
CRASHED = -1
MIN_TIMEOUT = 20.0  # seconds; a mutant gets four times as long as the unchanged module, and at least this

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,)}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of one module.

    Attributes:
        path: of the module, from the root of the tree.
        line: of the change, from 1.
        first, last: the range of bytes of the module's source that `after` replaces.
        operator: the kind of change.
        source: hash of the unchanged module, so that a result is not taken for one of another version.
    """

    path: str
    line: int
    first: int
    last: int
    operator: str
    before: str
    after: str
    source: str

    @property
    def key(self) -> tuple[str, str, int, int, str]:
        """What identifies the mutant in a file of results."""
        return self.path, self.source, self.first, self.last, self.after

    def apply(self, source: bytes) -> bytes:
        return source[:self.first] + self.after.encode() + source[self.last:]


class Mutator(ast.NodeVisitor):
    """Collects the mutants of one module. A method visits one kind of node and yields changes through `change`.

    Not mutated: asserts, annotations, docstrings, f-strings (Python 3.11 does not know where their expressions are),
    imports, and the guards of TYPE_CHECKING and __main__.
    """

    def __init__(self, path: str, source: bytes) -> None:
        self.path, self.source = path, source
        self.hash = hashlib.sha256(source).hexdigest()[:12]
        lines = source.splitlines(keepends=True)
        self.line_starts = [sum(map(len, lines[:i])) for i in range(len(lines) + 1)]
        self.mutants: list[Mutant] = []

    def change(self, node: ast.expr | ast.stmt, operator: str, after: str) -> None:
        """Record that `after` replaces the source of `node`."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        first = self.line_starts[node.lineno - 1] + node.col_offset
        last = self.line_starts[node.end_lineno - 1] + node.end_col_offset
        before = " ".join(self.source[first:last].decode().split())
        self.mutants.append(Mutant(self.path, node.lineno, first, last, operator, before, after, self.hash))

    def replace(self, node: ast.expr, operator: str, **fields: Any) -> None:
        """Record that `node` with other `fields` replaces it."""
        changed = type(node)(**{**{name: getattr(node, name) for name in node._fields}, **fields})
        self.change(node, operator, f"({ast.unparse(changed)})")

    # ---- nodes that are left out

    def visit_Assert(self, node: ast.Assert) -> None: ...
    def visit_JoinedStr(self, node: ast.JoinedStr) -> None: ...
    def visit_arg(self, node: ast.arg) -> None: ...

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for child in (*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults), *node.body):
            self.visit(child)

    def visit_If(self, node: ast.If) -> None:
        test = ast.unparse(node.test)
        if "TYPE_CHECKING" not in test and "__main__" not in test:
            self.generic_visit(node)

    # ---- expressions

    def visit_Compare(self, node: ast.Compare) -> None:
        for i, op in enumerate(node.ops):
            for other in COMPARISONS[type(op)]:
                self.replace(node, "comparison", ops=[*node.ops[:i], other(), *node.ops[i + 1:]])
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        sides = (node.left, node.right)
        is_text = any(isinstance(getattr(side, "value", None), (str, bytes)) for side in sides)
        if type(node.op) in OPERATORS and not is_text and not any(isinstance(x, ast.JoinedStr) for x in sides):
            self.replace(node, "arithmetic", op=OPERATORS[type(node.op)]())
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.replace(node, "and/or", op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, (ast.Not, ast.USub, ast.Invert)):
            self.change(node, "removed not or sign", f"({ast.unparse(node.operand)})")
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.replace(node, "swapped branches", body=node.orelse, orelse=node.body)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.change(node, "constant", str(not node.value))
        elif isinstance(node.value, (int, float)):
            for step in (1, -1):
                self.change(node, "constant", f"({node.value + step!r})")

    def visit_Call(self, node: ast.Call) -> None:
        for i in range(len(node.args) - 1):
            a, b = node.args[i:i + 2]
            if ast.unparse(a) != ast.unparse(b) and not any(isinstance(x, ast.Starred) for x in (a, b)):
                self.replace(node, "swapped arguments", args=[*node.args[:i], b, a, *node.args[i + 2:]])
        self.generic_visit(node)

    # ---- statements

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring, or ...
            if not isinstance(node.value, (ast.Yield, ast.YieldFrom)):
                self.change(node, "removed statement", "pass")
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if all(isinstance(target, (ast.Attribute, ast.Subscript)) for target in node.targets):
            self.change(node, "removed statement", "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.change(node, "removed statement", "pass")
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        self.change(node, "removed statement", "pass")  # what it raises is a message

    def visit_Continue(self, node: ast.Continue) -> None:
        self.change(node, "removed statement", "pass")

    def visit_Break(self, node: ast.Break) -> None:
        self.change(node, "removed statement", "pass")

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None:
            if not (isinstance(node.value, ast.Constant) and node.value.value is None):
                self.change(node, "returned None", "return None")
            self.generic_visit(node)


def find_mutants(root: Path, path: str) -> list[Mutant]:
    """Every mutant of a module, in the order of the source. Those that are no valid Python are left out."""
    source = (root / path).read_bytes()
    mutator = Mutator(path, source)
    mutator.visit(ast.parse(source))
    valid = []
    for mutant in sorted(mutator.mutants, key=lambda m: (m.first, m.last, m.after)):
        with contextlib.suppress(SyntaxError):
            ast.parse(mutant.apply(source))
            valid.append(mutant)
    return valid


# ---------------------------------------------------------------- running


def copy_tree(root: Path, target: Path) -> None:
    """Copy the files of a git checkout, committed or not, without those that git ignores."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root,
                            capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():  # a deleted file is listed until its deletion is committed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def run_tests(tree: Path, flags: Iterable[str], output: Path, connection: Connection) -> None:
    """In a forked process: run pytest in `tree`; sends (exit code, third-party modules loaded), and does not return.

    torch is loaded, so train.py's process is a fork of this one, not of a forkserver that would load it again.
    """
    os.setsid()
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.chdir(tree)
    sys.path[:] = [str(tree), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
    # The name of a test's module is tests.data.test_x or test_x, as pytest imports it.
    own = {path.stem for path in [*tree.iterdir(), *tree.glob("tests/**/*.py")]}
    for name in [name for name in sys.modules if name.partition(".")[0] in own]:
        del sys.modules[name]
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: (  # type: ignore[assignment]  # it has an overload per method
        get_context("fork" if method == "forkserver" else method))
    import pytest

    exit_code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line",
                                 "--hypothesis-seed=0", f"--basetemp={tree}.tests", *flags]))
    modules = [name for name in sys.modules if name.partition(".")[0] not in own | {"__main__", "conftest"}]
    sys.stdout.flush()
    connection.send((exit_code, modules))  # the parent then kills this process
    os._exit(0)


@dataclasses.dataclass
class Outcome:
    """exit_code: pytest's; CRASHED: its process ended without one; None: it ran into the time limit."""

    exit_code: int | None
    seconds: float
    modules: list[str]
    output: str

    @property
    def first_failure(self) -> str:
        """The first test that failed, or what ended the run."""
        failed = [line.split(" - ")[0].partition(" ")[2] for line in self.output.splitlines()
                  if line.startswith(("FAILED ", "ERROR "))]
        return failed[0] if failed else "time limit" if self.exit_code is None else f"pytest's exit {self.exit_code}"


def run_forked(tree: Path, tests: Iterable[str], markers: str, timeout: float, *flags: str) -> Outcome:
    """`run_tests` in a forked process, which is killed, with its children, after `timeout` seconds."""
    output, started = Path(f"{tree}.log"), time.perf_counter()
    output.unlink(missing_ok=True)
    receive, send = multiprocessing.Pipe(duplex=False)
    sys.stdout.flush()
    process = multiprocessing.get_context("fork").Process(target=run_tests,
                                                         args=(tree, [*flags, "-m", markers, *tests], output, send))
    process.start()
    send.close()
    exit_code: int | None = None
    modules: list[str] = []
    if receive.poll(timeout):
        try:
            exit_code, modules = receive.recv()
        except EOFError:
            exit_code = CRASHED
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # those that a test left behind, too
    process.join()
    text = output.read_text(errors="replace") if output.exists() else ""
    return Outcome(exit_code, time.perf_counter() - started, modules, text)


class Runner:
    """Tests mutants in a copy of the tree."""

    def __init__(self, root: Path, tests: dict[str, tuple[str, ...]], folder: Path) -> None:
        # Before torch is imported: a process cannot be forked from one whose OpenMP threads have begun.
        os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
        sys.dont_write_bytecode = True  # nor may bytecode of a mutant stay
        self.root, self.tests, self.tree = root, tests, folder / "tree"
        copy_tree(root, self.tree)
        self.timeouts: dict[tuple[str, str], float] = {}

    def timeout(self, path: str, markers: str) -> float:
        """The time limit of a module's mutants: four times what the unchanged module takes, which must pass."""
        if (path, markers) not in self.timeouts:
            outcome = run_forked(self.tree, self.tests[path], markers, 3600)
            if outcome.exit_code not in (0, 5):  # 5: no test has these markers
                raise UserError(f"{path}: its tests fail without a mutant: {outcome.first_failure} (fix them first)")
            for name in sorted(outcome.modules):  # so that the mutants' processes have them
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
            self.timeouts[path, markers] = max(MIN_TIMEOUT, 4 * outcome.seconds)
            print(f"{path}: {outcome.seconds:.0f} s without a mutant ({markers})", flush=True)
        return self.timeouts[path, markers]

    def check_environment(self, path: str, markers: str) -> None:
        """Raise `UserError` if pytest cannot load the tests of the unchanged module any more.

        Otherwise a mutant that pytest cannot load would be no different from a damaged environment.
        """
        outcome = run_forked(self.tree, self.tests[path], markers, 600, "--collect-only")
        if outcome.exit_code not in (0, 5):
            raise UserError(f"{path}: its tests cannot be loaded any more, without a mutant: {outcome.first_failure}")

    def run(self, mutant: Mutant, slow: bool) -> dict[str, Any]:
        """The record of a mutant for the file of results."""
        path, source = self.tree / mutant.path, (self.root / mutant.path).read_bytes()
        stages = (MARKERS, SLOW_MARKERS) if slow else (MARKERS,)
        seconds = 0.0
        for markers in stages:
            limit = self.timeout(mutant.path, markers)
            try:
                path.write_bytes(mutant.apply(source))
                outcome = run_forked(self.tree, self.tests[mutant.path], markers, limit)
            finally:
                path.write_bytes(source)
            seconds += outcome.seconds
            killed = outcome.exit_code not in (0, 5)
            if killed:
                if outcome.exit_code not in (1, None):
                    self.check_environment(mutant.path, markers)
                break
        return {**dataclasses.asdict(mutant),
                "status": "survived" if not killed else "killed" if outcome.exit_code is not None else "timeout",
                "by": outcome.first_failure if killed else None, "seconds": round(seconds, 2)}


# ---------------------------------------------------------------- results


def read_results(path: Path) -> list[dict[str, Any]]:
    """The records of a file of results; a last line that a kill cut off is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def result_key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("path", "source", "first", "last", "after"))


def report(records: list[dict[str, Any]]) -> Iterator[str]:
    """The lines of a report: a table by module, then every survivor."""
    totals = Counter(r["path"] for r in records)
    counts = Counter((r["path"], r["status"]) for r in records) + Counter(("all", r["status"]) for r in records)
    yield "| module | mutants | killed by a test | by the time limit | survived |"
    yield "|---|---|---|---|---|"
    for path, total in [*sorted(totals.items()), ("all", len(records))]:
        yield f"| {path} | {total} | {' | '.join(str(counts[path, s]) for s in ('killed', 'timeout', 'survived'))} |"
    if records:
        yield (f"\nscore: {1 - counts['all', 'survived'] / len(records):.1%}, "
               f"{sum(r['seconds'] for r in records):.0f} s")
    for r in sorted(records, key=lambda r: (r["path"], r["line"])):
        if r["status"] == "survived":
            yield f"{r['path']}:{r['line']}: {r['operator']}: {r['before']} -> {r['after']}"


def main(argv: list[str] | None = None, root: Path = ROOT, tests: dict[str, tuple[str, ...]] | None = None) -> None:
    tests = tests or TESTS
    assert __doc__ is not None
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--module", action="append", help="a module of TESTS; may be repeated (default: all)")
    parser.add_argument("--sample", type=int, help="test so many mutants, drawn from those of all modules together")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--minutes", type=float, help="stop after this time; the same command continues")
    parser.add_argument("--slow", action="store_true", help="run the tests marked slow too, for a mutant that survives")
    parser.add_argument("--output", type=user_path, default=Path("mutants.jsonl"), help="file of results, one per line")
    parser.add_argument("--report", action="store_true", help="print the score and the survivors of --output, and stop")
    options = parser.parse_args(argv)
    for module in options.module or ():
        if module not in tests:
            raise UserError(f"--module: {module!r} is unknown{did_you_mean(module, tests)}")
    if options.report:
        if not options.output.exists():
            raise DataError(f"--output: {options.output} does not exist")
        print("\n".join(report(read_results(options.output))))
        return
    mutants = [m for path in options.module or tests for m in find_mutants(root, path)]
    order = random.Random(options.seed).sample(mutants, len(mutants))  # a larger sample contains a smaller one
    sample = order[:options.sample]
    print(f"{len(sample)} of {len(mutants)} mutants, seed {options.seed}", flush=True)
    done = {result_key(r) for r in read_results(options.output)}
    torn = options.output.exists() and not options.output.read_bytes().endswith(b"\n")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, open(options.output, "a") as file:
        file.write("\n" * torn)  # what a kill in the middle of a line left
        runner = Runner(root, tests, Path(folder))
        for mutant in sample:
            if mutant.key in done:
                continue
            if options.minutes is not None and time.monotonic() - started > 60 * options.minutes:
                print(f"stopped after {options.minutes:g} minutes", flush=True)
                break
            record = runner.run(mutant, options.slow)
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(f"{record['status']:8} {record['seconds']:5.1f} s  {mutant.path}:{mutant.line} {mutant.operator}: "
                  f"{mutant.before:.50} -> {mutant.after:.50}", flush=True)
    keys = {mutant.key for mutant in sample}
    print("\n".join(report([r for r in read_results(options.output) if result_key(r) in keys])))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
