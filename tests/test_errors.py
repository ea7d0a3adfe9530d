"""Errors: one line on stderr, one exit code, printed by one process of those that raise it."""

import errno
import os
import pickle
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from blockgpt import errors
from blockgpt.errors import (
    ConfigError,
    NonFiniteError,
    PeerLostError,
    UserError,
    did_you_mean,
    error_text,
    exit_on_user_error,
    first_line,
    require_package,
    short_repr,
)


@pytest.mark.parametrize("environment, code, lines", [
    ({}, 2, 1), ({"WORLD_SIZE": "16", "LOCAL_RANK": "0", "RANK": "8"}, 2, 1),
    ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 2, 0), ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 5, 1),
    ({"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "1"}, 5, 0), ({"WORLD_SIZE": "2", "RANK": "1"}, 6, 1),
])
def test_a_mistake_is_printed_once_per_machine_and_a_failure_once_per_run(monkeypatch, capsys, environment, code,
                                                                          lines):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(SystemExit) as left, exit_on_user_error():
        raise {2: UserError, 5: NonFiniteError, 6: PeerLostError}[code]("one\ntwo \x1b[31m")
    assert left.value.code == code
    assert capsys.readouterr().err == "error: one two ?[31m\n" * lines


def test_an_error_of_one_rank_is_printed_there(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    error = UserError("out of memory")
    error.on_all_ranks = False
    with pytest.raises(SystemExit), exit_on_user_error():
        raise error
    assert capsys.readouterr().err == "error: out of memory\n" and UserError.on_all_ranks


@pytest.mark.parametrize("error, leaves", [
    (UserError("one\ntwo"), SystemExit), (ZeroDivisionError("x"), ZeroDivisionError)])
@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_torchrun_shows_the_line_or_the_traceback_of_every_process(monkeypatch, tmp_path, error, leaves, local_rank):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    for first in (error, UserError("a later one")):
        with pytest.raises((leaves, SystemExit)), exit_on_user_error():
            raise first
    failure = ProcessFailure(int(local_rank), 1, 2, str(tmp_path / "error.json"))
    summary = ChildFailedError("train.py", {int(local_rank): failure}).format_msg()
    assert "a later one" not in summary and abs(failure.timestamp - time.time()) < 3600
    if leaves is SystemExit:
        assert "  traceback : error: one two\n" in summary
    else:
        assert "ZeroDivisionError: x" in summary and "raise first" in summary


def test_the_caller_may_end_the_process_another_way():
    codes = []
    with exit_on_user_error(codes.append):
        raise PeerLostError("rank 1 is lost")
    assert codes == [6]


@pytest.mark.parametrize("statement, code, stderr", [
    ("raise KeyboardInterrupt", 130, "interrupted\n"), ("raise BrokenPipeError", 141, ""), ("pass", 0, ""),
])
def test_ctrl_c_and_a_closed_pipe_end_without_a_traceback(statement, code, stderr):
    program = f"from blockgpt.errors import exit_on_user_error\nwith exit_on_user_error(): {statement}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, stderr)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_scratch_folder_that_cannot_be_written_is_one_line_that_names_it(capsys, code):
    with pytest.raises(SystemExit) as left, exit_on_user_error():
        raise OSError(code, os.strerror(code), "/scratch/x")
    assert left.value.code == 2
    assert capsys.readouterr().err.strip().startswith(f"error: /scratch/x: {os.strerror(code)} (free disk space, or")


def test_a_bug_of_ours_keeps_its_traceback():
    with pytest.raises(FileNotFoundError), exit_on_user_error():
        raise FileNotFoundError(errno.ENOENT, "No such file", "x")
    with pytest.raises(AssertionError), exit_on_user_error():
        raise AssertionError("ours")


def test_every_error_has_its_own_exit_code():
    codes = {name: cls.exit_code for name, cls in vars(errors).items()
             if isinstance(cls, type) and issubclass(cls, UserError)}
    assert codes == {"UserError": 2, "ConfigError": 2, "DataError": 2, "CheckpointError": 3, "SaveError": 4,
                     "NonFiniteError": 5, "PeerLostError": 6, "OutOfMemoryError": 7}


def test_a_config_error_names_its_key_once_and_its_place():
    error = ConfigError("n_head", "5 does not divide n_embd=16")
    assert str(error) == "n_head: 5 does not divide n_embd=16"
    assert str(error.at("--n_head")) == "--n_head: 5 does not divide n_embd=16"
    assert str(error.at("--n_embd")) == "--n_embd: n_head: 5 does not divide n_embd=16"
    assert str(error.at("mine.py")) == "mine.py: n_head: 5 does not divide n_embd=16"


def test_errors_travel_between_processes():
    for error in (ConfigError("n_head", "is wrong"), UserError("no"), PeerLostError("rank 1")):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error) and str(copy) == str(error) and vars(copy) == vars(error)


@pytest.mark.parametrize("word, names, hint", [
    ("n_layers", ["n_layer", "n_head"], " (did you mean n_layer?)"),
    ("N_LAYER", ["n_layer"], " (did you mean n_layer?)"),
    ("x", ["llama", "gpt2"], " (one of llama, gpt2)"), ("x", [], ""), (3, [3, 4], " (did you mean 3?)"),
    ("qqqq", [f"name{i}" for i in range(20)] + ["qq"], " (did you mean qq?)"),
])
def test_a_near_miss_is_named_and_else_every_name(word, names, hint):
    assert did_you_mean(word, names) == hint


class Broken:
    def __repr__(self):
        raise RuntimeError


def test_a_value_in_a_message_is_short_whatever_it_is():
    assert short_repr("a\nb") == r"'a\nb'" and short_repr(Broken()) == "<Broken>" and short_repr(10**5000) == "<int>"
    assert len(short_repr("x" * 5000)) == 71 and short_repr("x" * 5000).endswith("xxx'")


def test_the_first_line_of_an_exception_or_its_type():
    assert first_line(ValueError("\none\ntwo")) == "one" and first_line(KeyError()) == "KeyError"
    assert len(first_line(ValueError("x" * 5000))) == 200


def test_an_error_is_one_line_of_text():
    assert error_text(OSError(28, "No space left on device")) == "No space left on device"
    assert error_text(RuntimeError("CUPTI\n  is busy")) == "CUPTI is busy" and error_text(KeyError()) == "KeyError"


def test_a_missing_package_is_answered_with_its_installation():
    assert require_package("json") is __import__("json")
    with pytest.raises(UserError, match=r"needs the package nowhere, .*No module named .* \(pip install nowhere\)"):
        require_package("nowhere")
