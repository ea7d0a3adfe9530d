"""Every command, on every console and however it is started: exit code and lines, and never a traceback."""

import ast
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, environment
from forked import SERVER, exec_script, run_train

COMMANDS = sorted(path.relative_to(ROOT).as_posix() for pattern in ("*.py", "tools/**/*.py", "data/*/prepare.py")
                  for path in ROOT.glob(pattern) if "\nif __name__ == \"__main__\":" in path.read_text())

# {situation: (streams that are no file: {descriptor: what it is}, encoding of the console)}
CONSOLES = {
    "ascii": ({}, "ascii"), "latin-1": ({}, "latin-1"), "stdout closed": ({1: "closed"}, "utf-8"),
    "stderr closed": ({2: "closed"}, "utf-8"), "stdin closed": ({0: "closed"}, "utf-8"),
    "all closed": ({0: "closed", 1: "closed", 2: "closed"}, "ascii"), "stdout full": ({1: "full"}, "utf-8"),
    "stderr full": ({2: "full"}, "utf-8"), "both full": ({1: "full", 2: "full"}, "ascii"),
    "stdout read no more": ({1: "pipe"}, "utf-8")}
SHORT = [*TINY, "--run_name=run", "--max_iters=2"]
# {command: (arguments, whether its work is done although nobody reads its output)}
CASES = {
    "train.py --help": False, "train.py --list_presets": False, "train.py --nope=1": False,
    f"train.py {' '.join(SHORT)} --resume=must --data_dir=DATA": True,
    f"train.py {' '.join(SHORT)} --out_dir=OUT --data_dir=DATA": True,
    f"train.py {' '.join(SHORT)} --dry_run --data_dir=DATA": False,
    "compare_architectures.py": False, "sample.py --run=runs/run --max_new_tokens=4 --temperature=0 --prompt=é…": False,
    "data/files/prepare.py --name=x --input=text.txt --out_dir=OUT --tokenizer=byte --by_position --workers=1": True,
    "tools/inspect_data.py text --data_dir=DATA --tokens=2000": False,
    "tools/verify_checkpoint.py runs/run": False, "tools/list_components.py --help": False,
    "tools/torture/__main__.py --help": False,
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, data_dir):
    """A folder with a finished run and a text."""
    folder = tmp_path_factory.mktemp("consoles")
    done = run_train([*SHORT, f"--data_dir={data_dir}"], folder, environment(), folder / "output")
    assert done.returncode == 0
    (folder / "text.txt").write_text("déjà vu … " * 2000)
    return folder


def exit_code_of(console, command, works_unread):
    """The exit code that a command must have on a console."""
    broken = CONSOLES[console][0].get(1)
    if "--nope" in command:
        return 2
    if broken in (None, "closed") or (works_unread and not (broken == "pipe" and "prepare" in command)):
        return 0
    return 0 if broken == "full" and "--dry_run" in command else {"full": 2, "pipe": 141}[broken]


@pytest.mark.slow
@pytest.mark.parametrize("command", CASES)
def test_every_command_works_on_every_console(workplace, data_dir, tmp_path, command):
    script, *arguments = command.split()
    for console, (streams, encoding) in CONSOLES.items():
        if "full" in streams.values() and not os.path.exists("/dev/full"):
            continue
        out_dir, output = tmp_path / console.replace(" ", "-"), tmp_path / "output"
        argv = [word.replace("OUT", str(out_dir)).replace("DATA", str(data_dir)) for word in arguments]
        process = SERVER.Process(target=exec_script, args=(script, argv, str(workplace), environment(), str(output),
                                                           streams, encoding))
        process.start()
        process.join(120)
        out, err = (Path(f"{output}.{name}").read_bytes().decode(encoding) for name in ("out", "err"))
        context = f"{command} on a console that is {console}:\n{out[-2000:]}\n{err[-2000:]}"
        assert process.exitcode == exit_code_of(console, command, CASES[command]), context
        assert "Traceback" not in err and "Exception ignored" not in err, context
        lines = err.splitlines()
        if "--nope" in command:
            assert len(lines) == (2 not in streams), context
        elif streams.get(1) in ("full", "pipe") and 2 not in streams and process.exitcode != 141:
            assert len(lines) == 1 and "cannot be written" in lines[0], context
        elif "prepare" not in command:
            assert not lines, context
        if "--resume" in command:
            assert json.loads((workplace / "runs/run/run.json").read_text())["status"] == "finished", context
        if "--out_dir" in command and "train.py" in command:
            assert json.loads((out_dir / "run/run.json").read_text())["status"] == "finished", context
    if script == "compare_architectures.py":
        assert "-RMS-" in out or out == ""


def shell(line, cwd=None, **variables):
    """Run a line of the shell; the finished process, with its output as text."""
    return subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], cwd=cwd, capture_output=True, timeout=120,
                          env=environment(PYTHON=sys.executable, ROOT=str(ROOT), **variables), text=True,
                          errors="surrogateescape", stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("line, code, out, err", [
    ('"$PYTHON" "$ROOT/train.py" --help >&-', 0, "", ""),
    ('"$PYTHON" "$ROOT/train.py" --nope 2>&-', 2, "", ""),
    ('"$PYTHON" "$ROOT/train.py" --help >/dev/full', 2, "",
     "error: the output cannot be written: No space left on device\n"),
    ('"$PYTHON" "$ROOT/train.py" --nope 2>/dev/full', 2, "", ""),
    ('"$PYTHON" "$ROOT/train.py" --help | sleep 0', 141, "", ""),
    ('"$PYTHON" -c "from model_config import list_presets; list_presets()" >/dev/full', 2, "",
     "error: the output cannot be written: No space left on device\n"),
])
def test_the_interpreter_itself_ends_without_a_word(line, code, out, err):
    done = shell(line)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


@pytest.mark.parametrize("variables", [
    {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_what_a_console_cannot_encode_looks_like_it(variables):
    done = shell('"$PYTHON" "$ROOT/train.py" --list_presets && "$PYTHON" "$ROOT/train.py" --run_name=…/é', **variables)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert "RoPE" in done.stdout and "?" not in done.stdout


def test_columns_stay_aligned_where_characters_are_replaced():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="blockgpt.lookalike")
    stream.write("a … é → 3 × 4 · ünï 火\udce9")
    stream.seek(0)
    assert stream.read() == "a ~ e > 3 x 4 - uni ??"


# ---- how it is started

@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_begins_with_the_startup_and_parses_in_an_old_python(command):
    """So an old Python prints one line, and a package that is missing another."""
    tree = ast.parse((ROOT / command).read_text(), feature_version=(3, 8))
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    line = next(node.lineno for node in tree.body if isinstance(node, ast.Import)
                and node.names[0].name == "blockgpt.startup")
    before = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)) and node.lineno < line]
    modules = {getattr(node, "module", None) or node.names[0].name for node in before}
    assert all(name.partition(".")[0] in sys.stdlib_module_names for name in modules), modules
    inserted = next(node for node in tree.body if "sys.path.insert" in ast.unparse(node))
    parents = f".parents[{command.count('/')}]" if "/" in command else ".parent"
    assert inserted.lineno < line and ast.unparse(inserted).endswith(f"{parents}))")


def test_the_list_of_commands_is_not_empty():
    assert {"train.py", "sample.py", "compare_architectures.py", "tools/torture/__main__.py",
            "data/files/prepare.py", "tools/demo.py"} <= set(COMMANDS)
    ast.parse((ROOT / "blockgpt/startup.py").read_text(), feature_version=(3, 8))


# Runs what follows as a Python that says it is 3.9.
OLD = ("import runpy, sys; sys.version_info = (3, 9, 7); sys.argv = sys.argv[1:]; "
       "runpy.run_path(sys.argv[0], None, '__main__')")


@pytest.mark.parametrize("command", ["train.py", "tools/inspect_data.py", "data/files/prepare.py"])
def test_an_old_python_is_one_line(tmp_path, command):
    done = subprocess.run([sys.executable, "-c", OLD, ROOT / command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: this needs Python 3.10 or newer, ") and " is 3.9 (" in done.stderr


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_leaves_no_environment_of_an_old_python_or_of_one_that_fails(tmp_path):
    (tmp_path / "blockgpt").mkdir()
    for name in ("Makefile", "requirements.txt", "blockgpt/startup.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    old = tmp_path / "old"
    old.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{OLD}" "$@"\n')
    broken = tmp_path / "broken"  # such as Debian's without python3-venv
    broken.write_text(f'#!/bin/sh\n[ "$1" = -m ] && mkdir -p .venv/bin && touch .venv/bin/python && exit 1\n'
                      f'exec "{sys.executable}" "$@"\n')
    for script in (old, broken):
        script.chmod(0o755)
        done = subprocess.run(["make", "demo", f"PYTHON={script}"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and not (tmp_path / ".venv").exists()
        assert ("error: this needs Python 3.10" in done.stderr) == (script is old)


@pytest.mark.parametrize("command", ["train.py --max_iters=1", "sample.py --run=runs/x", "tools/inspect_data.py text",
                                     "tools/list_components.py"])
def test_without_the_packages_there_is_one_line(tmp_path, command):
    script, *arguments = command.split()
    done = subprocess.run([sys.executable, "-S", ROOT / script, *arguments], cwd=tmp_path, capture_output=True,
                          text=True, env=environment())  # -S: no site-packages
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: the package ") and "is not installed" in done.stderr
    assert not list(tmp_path.iterdir())


def test_without_torch_help_and_comparison_work(tmp_path):
    for command in ("train.py --help", "compare_architectures.py --help", "train.py --list_presets"):
        script, *arguments = command.split()
        done = subprocess.run([sys.executable, "-S", ROOT / script, *arguments], cwd=tmp_path, capture_output=True,
                              env=environment())
        assert (done.returncode, done.stderr) == (0, b""), command


SLOW_IMPORTS = {"torch._dynamo", "sympy", "triton", "torch.distributed.tensor", "torch._inductor", "scipy", "pandas"}


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["gpt2", "llama"])
def test_a_run_imports_nothing_slow_and_the_garbage_collector_runs(tmp_path, data_dir, preset):
    """From its first line to its last, with a save and an evaluation; each of these imports takes 0.1 to 2 seconds."""
    code = ("import gc, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], None, '__main__')\n"
            f"assert not {SLOW_IMPORTS!r} & set(sys.modules), {SLOW_IMPORTS!r} & set(sys.modules)\n"
            "assert gc.isenabled() and gc.get_freeze_count() > 100_000, gc.get_freeze_count()")
    done = subprocess.run([sys.executable, "-c", code, ROOT / "train.py", *SHORT, f"--arch_preset={preset}",
                           f"--data_dir={data_dir}"], cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode == 0 and "best val_loss" in done.stdout, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{}, {"PYTHONSAFEPATH": "1"}])
def test_a_command_is_started_by_its_path_from_any_folder(tmp_path, variables):
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for command in ("train.py", "compare_architectures.py", "sample.py", "tools/torture/__main__.py",
                    "tools/inspect_data.py", "data/files/prepare.py"):
        done = subprocess.run([sys.executable, ROOT / command, "--help"], cwd=tmp_path, capture_output=True, text=True,
                              env={**inherited, **variables})
        assert done.returncode == 0 and done.stderr == "" and "usage" in done.stdout
