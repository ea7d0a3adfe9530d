"""What people see of a run: fields that fit, a bar, phases, history, colours, the end."""

import io
import re
import time

import pytest

from blockgpt import console as console_module
from blockgpt import progress
from blockgpt.console import paint
from blockgpt.progress import Field, RunConsole, fit_fields, print_end, step_fields

RECORD = {"step": 1250, "loss": 1.4559, "tokens_per_sec": 19512.0, "mfu": 0.584, "tflops": 0.0373, "step_time": 0.105,
          "lr": 1e-3, "grad_norm": 1.33, "memory": {"allocated": 2**30}, "metrics": {"accuracy": 0.5},
          "communication": {"share": 0.1, "exposed": 0.05}}


def at_half(live=True, compiled=False, **record):
    """The console of a run that has done 1,250 of 2,000 steps and logged the newest one."""
    console = RunConsole(2000, compiled=compiled)
    console.live = live
    console.newest, console.done, console.word = RECORD | record, 1250, "training"
    console.first_step = (1, time.time() - 100)
    return console


def names(text):
    """Which fields a line has: its words, without digits."""
    return set(re.findall(r"[a-zA-Z|/%]+|━", text))


def test_fields_drop_out_whole_and_by_worth_as_the_line_gets_narrower():
    record = RECORD | {"communication": None, "metrics": {}}
    for make in (lambda width: at_half().line(width),
                 lambda width: "   ".join(f.text for f in fit_fields(step_fields(record, 2000, 60.0), width, "   "))):
        narrower = None
        for width in range(220, 11, -1):
            line = make(width)
            assert len(line) <= width
            assert narrower is None or names(line) <= narrower, (width, line)  # nothing comes back
            narrower = names(line)


@pytest.mark.parametrize("width, fields", [
    (40, ["62%", "1250/2000", "left", "loss 1.4559"]),
    (79, ["training", "━", "62%", "1250/2000", "left", "loss 1.4559", "19,512 tok/s"]),
    (119, ["training", "━", "62%", "1250/2000", "left", "loss 1.4559", "19,512 tok/s", "MFU 58.4%", "105.0 ms", "|g|"]),
    (199, ["training", "━" * 25, "62%", "1250/2000", "left", "loss 1.4559", "19,512 tok/s", "MFU 58.4%", "105.0 ms",
           "|g| 1.33", "lr 1.00e-03"])])
def test_what_the_line_has_at_the_usual_widths(width, fields):
    line = at_half().line(width)
    assert all(field in line for field in fields), line
    assert ("training" in fields) == ("training" in line)


def test_a_line_of_a_pipe_has_every_field():
    line = "   ".join(field.text for field in step_fields(RECORD, 2000, 61.0))
    assert line == ("step   1250/2000   loss 1.4559      19,512 tok/s   MFU 58.4%   0.0373 TFLOP/s   communication "
                    "10.0%, 5.0% exposed   left 1m01s     105.0 ms   lr 1.00e-03   |g| 1.33   1.00 GiB   "
                    "accuracy 0.5000")


def test_equal_ranks_keep_the_first():
    fields = [Field("aa", 1), Field("b", 0), Field("cc", 1)]
    assert [f.text for f in fit_fields(fields, 4, " ")] == ["aa", "b"] and fit_fields(fields, 0, " ") == []


@pytest.fixture
def terminal(monkeypatch, capsys):
    """terminal() -> what was printed since the last call, on a terminal of 80 columns without colours."""
    monkeypatch.setattr(console_module, "is_terminal", lambda: True)
    monkeypatch.setattr(console_module.LiveLine, "open", False)
    for name, value in {"COLUMNS": "80", "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    return lambda: capsys.readouterr().out


def test_every_phase_has_its_word_and_compiling_is_the_first_of_a_compiled_model(terminal):
    console = RunConsole(10, compiled=True)
    for phase, step in (("data", None), ("build", None), ("step", 1), ("step", 2), ("evaluation", None), ("save", None),
                        ("verify", None), ("export", None), ("step", 3), ("evaluation", None), ("end", None)):
        console.drawn = 0.0
        console.enter_phase(phase, step)
    words = [text.split()[0] for text in terminal().split("\r\x1b[K")]
    assert words[:-1] == ["loading", "building", "compiling", "training", "compiling", "saving", "verifying",
                          "exporting", "training", "evaluating"]


def test_drawing_is_throttled(terminal):
    console = at_half()
    for step in range(1000):
        console.enter_phase("step", step + 1)
    assert terminal().count("\r") <= 2


def test_a_terminal_keeps_a_twentieth_of_the_lines_and_a_pipe_all(terminal):
    for live, kept_lines in ((True, 20), (False, 100)):
        console = RunConsole(100)
        console.live = live
        for step in range(1, 101):
            console.step(RECORD | {"step": step})
        console.close()
        assert len(re.findall(r"step +\d+/100   loss.*\n", terminal())) == kept_lines


def test_a_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    console = RunConsole(100)
    console.step(RECORD | {"step": 1})
    console.warning("x")
    text = terminal()
    assert "step      1/100" in text and "\x1b" not in text and "\r" not in text


@pytest.mark.parametrize("variables, terminal_has, pipe_has", [
    ({}, True, False), ({"NO_COLOR": "1"}, False, False), ({"NO_COLOR": ""}, True, False),
    ({"TERM": "dumb"}, False, False), ({"FORCE_COLOR": "1"}, True, True), ({"FORCE_COLOR": "0"}, False, False),
    ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False), ({"FORCE_COLOR": "1", "TERM": "dumb"}, True, True)])
def test_where_there_are_colours(monkeypatch, variables, terminal_has, pipe_has):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for stream, has in ((terminal, terminal_has), (io.StringIO(), pipe_has)):
        assert paint("x", "green", stream) == ("\x1b[32mx\x1b[0m" if has else "x")


def test_other_lines_take_the_place_of_the_line_that_is_rewritten(terminal):
    console = at_half()
    console.refresh()
    console.info("one")
    console_module.echo("two")
    console.refresh()
    texts = terminal().split("\r\x1b[K")
    assert len(texts) == 2 and texts[1].startswith("one\ntwo\n") and console_module.LiveLine.open is False


def test_the_time_left_is_of_the_steps_of_this_process(monkeypatch):
    console = RunConsole(100)
    assert console.seconds_left() is None
    monkeypatch.setattr(progress.time, "time", lambda: 50.0)
    console.done, console.first_step = 40, (30, 40.0)  # resumed at 29
    assert console.seconds_left() == 60.0


def test_the_end_has_the_results_and_commands_to_paste(capsys):
    results = {"step": 2000, "tokens": 1_638_400, "tokens_per_sec": 19512.3, "val_loss": 1.4570,
               "best_val_loss": 1.4559, "best_step": 1750}
    print_end(RunConsole(2000), results, "val_loss", 84.0, [["python", "sample.py", "--run=my runs/x"]])
    assert capsys.readouterr().out == (
        "best val_loss 1.4559 at step 1750, at the end 1.4570\n"
        "2,000 steps, 1,638,400 tokens in 1m24s, 19,512 tokens/s\n"
        "next:\n  python sample.py '--run=my runs/x'\n")
    print_end(RunConsole(2000), {"step": 5}, "val_loss", 84.0, [])
    assert capsys.readouterr().out == "next:\n"
