"""Advice in messages: every command, flag and file that a message names exists, and what is pasted is quoted."""

import ast
import re
import shlex

import pytest
from conftest import ROOT

import compare_architectures
import sample
from blockgpt.console import resume_flags
from blockgpt.data import dataset, token_files
from blockgpt.errors import DataError, UserError
from configurator import KEYS, RENAMED_KEYS, load_config

TORCHRUN = {"standalone", "nproc_per_node", "nnodes", "max_restarts", "key"}  # and --key=value
SOURCES = sorted({*ROOT.glob("*.py"), *ROOT.glob("blockgpt/**/*.py"), *ROOT.glob("tools/**/*.py"),
                  *ROOT.glob("data/*/*.py")})
# Commands that are run and not shown: flags of git, pytest and nanoGPT.
NOT_ADVICE = {"tools/mutate.py", "tools/bench_nanogpt_cpu.py"}


def messages(text):
    """(line, text) of every string of a module that is no docstring; {…} stands for what an f-string inserts."""
    tree = ast.parse(text)
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    skipped |= {id(value) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for value in node.values}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(v.value if isinstance(v, ast.Constant) else "{…}" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def declared_flags():
    """Every flag of every command."""
    declared = {call.args[i].value.lstrip("-") for path in SOURCES for call in ast.walk(ast.parse(path.read_text()))
                if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument"
                for i in range(len(call.args)) if isinstance(call.args[i], ast.Constant)}
    return declared | set(KEYS) | TORCHRUN | {"help"}


def unknown_flags(text, flags):
    return {flag for flag in re.findall(r"(?<![\w-])--([a-z][a-z0-9_-]+)", text)
            if not {flag, flag.replace("-", "_"), flag.removeprefix("no_")} & flags}


def missing_files(text):
    """The scripts and modules of `python …` in a text that do not exist."""
    scripts = re.findall(r"python ([\w/]+\.py)", text)
    modules = [f"{name.replace('.', '/')}.py" for name in re.findall(r"python -m ([\w.]+)", text) if name != "pip"]
    return [path for path in (*scripts, *modules)
            if not (ROOT / path).is_file() and not (ROOT / path.removesuffix(".py") / "__main__.py").is_file()]


def test_every_flag_and_command_in_a_message_exists():
    flags, found = declared_flags(), []
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        for line, text in messages(path.read_text()):
            git = "--abbrev" in text or "--dirty" in text or "--always" in text or "--exclude" in text
            if name not in NOT_ADVICE and not git:
                found += [f"{name}:{line}: --{flag}" for flag in unknown_flags(text, flags)]
            found += [f"{name}:{line}: {file}" for file in missing_files(text)]
    assert found == []


def test_a_flag_or_command_that_does_not_exist_is_found():
    assert unknown_flags("use --n_layr=3 or --n_layer=3", declared_flags()) == {"n_layr"}
    assert missing_files("python trian.py, python -m tools.nothing, python train.py, python -m tools.torture") == [
        "trian.py", "tools/nothing.py"]


# What flags are called or expect that are paths, and those of them whose use expands a ~.
PATHS = {"FILE", "DIR", "IMAGE", "out_dir", "data_dir", "folder", "output", "plot", "plan", "run", "runs", "path",
         "directory", "source", "input", "tokenizer", "nanogpt"}
EXPANDED = {"input", "data_dir", "tokenizer"}


def test_every_flag_that_is_a_path_takes_a_tilde():
    """A shell leaves it as it is in --out_dir=~/runs: a folder named ~ would be made."""
    found = set()
    for path in SOURCES:
        for call in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument" and call.args):
                continue
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            name = ast.unparse(call.args[0]).strip("'-")
            is_path = PATHS & {name, keywords.get("metavar", "").strip("'")} and "action" not in keywords
            if is_path and keywords.get("type") not in ("user_path", "os.path.expanduser", "int"):
                found.add(f"{path.relative_to(ROOT)}: {name}")
    assert {entry for entry in found if entry.split(": ")[1] not in EXPANDED} <= {
        "blockgpt/data/commands.py: source"}  # of read_source, which expands it


def test_every_key_and_config_file_takes_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("max_iters = 7\nout_dir = '~/others'\n")
    run = tmp_path / "runs/a"
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"config": {"n_layer": 3}}')
    assert load_config(["~/mine.py"]).flat() | {"max_iters": 7, "out_dir": f"{tmp_path}/others"} == (
        load_config(["~/mine.py"]).flat())
    assert load_config(["--out_dir=~/runs", "--run_name=a", "--resume=must"]).model.n_layer == 3
    assert load_config(["--init_from=~/runs/a"]).model.n_layer == 3
    assert load_config(["--data_dir=~/d"]).data_dir == f"{tmp_path}/d"
    assert sample.parse_args(["--run=~/runs/a"]).run == str(run)


def test_no_message_names_a_former_key():
    found = [(path.name, line) for path in SOURCES if path.name != "configurator.py"
             for line, text in messages(path.read_text()) if any(f"--{name}" in text for name in RENAMED_KEYS)]
    assert found == []


@pytest.mark.parametrize("run_dir, flags", [
    ("runs/a", ["--resume=must", "--run_name=a"]), ("runs/a b", ["--resume=must", "--run_name=a b"]),
    ("/x y/runs/it's", ["--resume=must", "--run_name=it's", "--out_dir=/x y/runs"]),
    ("a", ["--resume=must", "--run_name=a", "--out_dir=."]),
])
def test_the_flags_that_continue_a_run_are_complete_and_quoted(run_dir, flags):
    assert shlex.split(resume_flags(run_dir)) == flags


def test_the_flags_that_continue_a_run_find_it(tmp_path):
    run = tmp_path / "my runs/a b"
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"config": {"max_iters": 7}}')
    config = load_config(shlex.split(resume_flags(run)))
    assert config.resuming and config.max_iters == 7


def test_commands_about_other_folders_name_them(tmp_path, monkeypatch):
    folder = tmp_path / "my runs"
    folder.mkdir()
    with pytest.raises(UserError) as raised:
        compare_architectures.select_runs([], str(folder))
    assert f"config/size_demo.py '--out_dir={folder}')" in str(raised.value)
    load_config(shlex.split(str(raised.value).partition("train.py ")[2].rstrip(")")))
    with pytest.raises(UserError, match=f"compare_architectures.py '--out_dir={folder}' lists"):
        sample.load_model(folder / "none", "best", "cpu")
    assert dataset.prepare_command("pycode", folder).endswith(f"--out_dir '{folder}/pycode'")
    (folder / "train.bin").write_text("text " * 100)
    with pytest.raises(DataError, match=f"'--input={folder}/train.bin'"):
        token_files.check_bare_file(folder / "train.bin", dataset.DTYPES["uint16"])
