"""Fixtures of several tests: a small dataset of text, and train.py run as a user runs it."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and the tests run side by side
os.environ["COLUMNS"] = "120"  # as without a terminal
for name in ("NO_COLOR", "FORCE_COLOR"):
    os.environ.pop(name, None)

from forked import run_train

from blockgpt.data.prepare import write_dataset
from blockgpt.data.sources import SHAKESPEARE
from blockgpt.data.tokenizer import ByteTokenizer, load_tokenizer
from blockgpt.errors import UserError
from blockgpt.experiments.records import read_log
from configurator import load_config
from tools.train_tokenizer import main as train_tokenizer

settings.register_profile("untimed", deadline=None)  # how long an example takes depends on the machine
settings.load_profile("untimed")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job of a shell; tests send the signal
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items):
    """Mark the cases of a `grid` as slow, except every n-th. It runs before -m selects."""
    cases = {}
    for item in items:
        for mark in item.iter_markers("grid"):
            index = cases.setdefault(item.function, itertools.count())
            if next(index) % mark.args[0]:
                item.add_marker(pytest.mark.slow)


TINY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=4", "--eval_tokens=512",
        "--dataset=text", "--device=cpu", "--mfu_peak=1", "--log_interval=1"]


@pytest.fixture(scope="session")
def sources():
    """This project's own sources, as texts."""
    return [p.read_text() for p in sorted([*ROOT.glob("*.py"), *ROOT.glob("blockgpt/**/[!_]*.py")])]


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory, sources):
    """The path of a SentencePiece BPE model trained on the project's sources; its .tiktoken form is next to it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for i, text in enumerate(sources):
        (folder / f"{i}.txt").write_text(text)
    train_tokenizer(["--input", f"{folder}/*.txt", "--vocab_size=700", f"--output={folder / 'tiny'}", "--export_bpe",
                     "--max_sentences=200"])
    return folder / "tiny.model"


@pytest.fixture(scope="session")
def gpt2():
    """GPT-2's tokenizer; the test is skipped without a cache of tiktoken, since tests download nothing."""
    if not os.path.isdir(os.environ.get("TIKTOKEN_CACHE_DIR", "")):
        pytest.skip("GPT-2's BPE is not cached here (set TIKTOKEN_CACHE_DIR)")
    return load_tokenizer("gpt2")


@pytest.fixture
def tinyshakespeare():
    """The path of Tiny Shakespeare; the test is skipped without it."""
    path = os.environ.get("BLOCKGPT_TINYSHAKESPEARE")
    if path is None:
        pytest.skip(f"Tiny Shakespeare is not here (get {SHAKESPEARE[0]} and set BLOCKGPT_TINYSHAKESPEARE to its path)")
    return path


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with one dataset, `text`: this project's own sources as bytes."""
    folder = tmp_path_factory.mktemp("data")
    sources = sorted([*ROOT.glob("*.py"), *ROOT.glob("blockgpt/**/[!_]*.py")])
    documents = [("val" if i % 5 == 0 else "train", p.read_text()) for i, p in enumerate(sources)]
    write_dataset(folder / "text", ByteTokenizer(), documents, source="blockGPT")
    return folder


def environment(**more):
    """The environment of a child process: the project is importable; one thread, since results depend on the number."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def run_python(*command, cwd=None, timeout=240, env=None):
    """Run `python *command` with the project importable; the finished process, its output as text."""
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=environment(**(env or {})),
                          timeout=timeout, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def config_error(*argv):
    """The message of the `UserError` for these arguments of train.py."""
    with pytest.raises(UserError) as raised:
        load_config(argv)
    return str(raised.value)


def records(run_dir, kind="step"):
    """{step: record} of a metrics.jsonl, as the comparison reads it; every line must be whole."""
    log, broken = read_log(Path(run_dir) / "metrics.jsonl")
    assert not broken
    return {r["step"]: r for r in log if r["kind"] == kind}


@pytest.fixture
def train(tmp_path, tmp_path_factory, data_dir):
    """train(name, *flags, env={}, unprivileged=False) -> the finished process of a tiny run in tmp_path/runs/name."""
    output = tmp_path_factory.mktemp("output") / "train"

    def run(name, *flags, env=None, unprivileged=False):
        argv = [*TINY, f"--data_dir={data_dir}", f"--run_name={name}", *map(str, flags)]
        if any(key.startswith("PYTHON") for key in env or ()):  # which an interpreter reads at its start
            return run_python(ROOT / "train.py", *argv, cwd=tmp_path, env=env)
        return run_train(argv, tmp_path, environment(**(env or {})), output, unprivileged=unprivileged)
    return run


@pytest.fixture
def untraced(monkeypatch):
    """flex_attention on the CPU as plain operations, without a second of tracing for every new mask."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
