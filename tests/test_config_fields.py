"""Configuration keys: declaration, flags, values from text, validation."""

import dataclasses
from dataclasses import dataclass

import pytest
from conftest import ROOT, run_python

from blockgpt.config_fields import (
    KeyParser,
    check_fields,
    check_folder_name,
    coerce,
    example_value,
    key,
    key_types,
    located,
    parse_int,
    parse_value,
    read_config_file,
    tuples_to_lists,
)
from blockgpt.errors import ConfigError, UserError
from configurator import help_text, key_parser, load_config


@dataclass
class Keys:
    width: int = key(4, "channels", group="model", minimum=1, maximum=10, example=8)
    rate: float = key(0.5, "step size of 100% of it", group="model", above=0.0, below=1.0, example=0.1)
    size: int | None = key(None, "None: derived", group="model", example=2)
    norm: str = key("layer", "norm", group="model", choices=("layer", "rms"))
    fast: bool = key(False, "faster", group="run")
    compile: bool | None = key(None, "compiled", group="run")
    peak: str | float = key("dense", "a name or a number", group="run", example=3.0)
    mix: str | dict[str, float] = key("text", "one or several", group="run", example={"a": 1})
    phases: list[int] | None = key(None, "steps", group="run", example=[1, 2])
    internal: int = 0  # not a key


FIELDS = {f.name: f for f in dataclasses.fields(Keys)}
TYPES = key_types(Keys)


def parse(name, text):
    return coerce(FIELDS[name], TYPES[name], parse_value(FIELDS[name], TYPES[name], text))


def test_the_types_of_a_key_are_those_of_its_annotation():
    none = type(None)
    expected = {"width": (int,), "rate": (float,), "size": (int, none), "norm": (str,), "fast": (bool,),
                "compile": (bool, none), "peak": (str, float), "mix": (str, dict), "phases": (list, none)}
    assert expected == TYPES


def test_the_example_is_a_legal_value_other_than_the_default():
    examples = {name: example_value(FIELDS[name], TYPES[name]) for name in TYPES}
    assert examples == {"width": 8, "rate": 0.1, "size": 2, "norm": "rms", "fast": True, "compile": True, "peak": 3.0,
                        "mix": {"a": 1}, "phases": [1, 2]}
    check_fields(Keys(**examples))


@pytest.mark.parametrize("name, text, value", [
    ("width", "7", 7), ("width", "1e1", 10), ("width", "1_0", 10), ("rate", "1e-3", 1e-3), ("size", "None", None),
    ("size", "none", None), ("norm", "rms", "rms"), ("fast", "Yes", True), ("fast", "0", False),
    ("compile", "none", None), ("peak", "312", 312.0), ("peak", "sparse", "sparse"), ("mix", "text", "text"),
    ("mix", "{'a': 1}", {"a": 1}), ("mix", "None", "None"), ("phases", "(1, (2, 3))", [1, [2, 3]]),
])
def test_the_type_of_the_key_decides_what_a_text_means(name, text, value):
    assert parse(name, text) == value and type(parse(name, text)) is type(value)


@pytest.mark.parametrize("name, text, message", [
    ("width", "two", "'two' is not a whole number"), ("width", "2.5", "'2.5' is not a whole number"),
    ("width", "nan", "'nan' is not a whole number"), ("width", "inf", "'inf' is not a whole number"),
    ("rate", "", "'' is not a number"), ("fast", "maybe", r"'maybe' is not a boolean \(True or False\)"),
    ("width", "0", "0 is out of range, must be at least 1"), ("width", "11", "must be at most 10"),
    ("size", str(2**63), f"must be at most {2**63 - 1}"), ("rate", "0", "0.0 is out of range, must be above 0"),
    ("rate", "1", "1.0 is out of range, must be below 1"), ("rate", "nan", "nan is not a finite number"),
    ("norm", "layr", r"'layr' is unknown \(did you mean layer\?\)"), ("peak", "", "is empty"),
    ("peak", "a\0", r"'a\\x00' has characters that cannot be printed"), ("mix", "{'a'", "is not a Python dict or list"),
    ("mix", "{'a': f()}", "is not a Python dict or list"), ("phases", "often", "'often' is str, not list or None"),
])
def test_a_text_that_its_key_does_not_take_is_refused(name, text, message):
    with pytest.raises(ConfigError, match=message) as refused:
        parse(name, text)
    assert refused.value.key == name


@pytest.mark.parametrize("name, value, coerced", [
    ("width", 4.0, 4), ("rate", 0.25, 0.25), ("peak", 3, 3.0), ("phases", (1, (2,)), [1, [2]]), ("size", None, None),
    ("mix", {"a": (1, 2)}, {"a": [1, 2]}),
])
def test_a_value_of_a_file_is_converted_to_the_type_of_its_key(name, value, coerced):
    got = coerce(FIELDS[name], TYPES[name], value)
    assert got == coerced and type(got) is type(coerced)


@pytest.mark.parametrize("name, value, message", [
    ("width", True, "True is bool, not int"), ("width", "4", "'4' is str, not int"), ("fast", 1, "1 is int, not bool"),
    ("width", None, "None is NoneType, not int"), ("size", 2.5, "2.5 is float, not int or None"),
])
def test_a_value_of_the_wrong_type_is_refused(name, value, message):
    with pytest.raises(ConfigError, match=message):
        coerce(FIELDS[name], TYPES[name], value)
    with pytest.raises(ConfigError, match=message):
        check_fields(Keys(**{name: value}))


def test_a_value_that_contains_itself_is_refused():
    endless = {}
    endless["a"] = endless
    with pytest.raises(ConfigError, match="mix: is nested too deeply"):
        coerce(FIELDS["mix"], TYPES["mix"], endless)


def test_whole_numbers_are_exact():
    assert parse_int("9007199254740993") == 2**53 + 1 and parse_int("1e4") == 10_000
    assert tuples_to_lists((1, {"a": (2,)})) == [1, {"a": [2]}]


def test_located_adds_the_place():
    with pytest.raises(UserError, match=r"^mine\.py: width: no$"), located("mine.py"):
        raise ConfigError("width", "no")


@pytest.mark.parametrize("name", ["a/b", "..", ".a", " a", "a ", "a\\b", 256 * "a", 128 * "é"])
def test_a_folder_name_is_one_that_any_system_takes(name):
    check_folder_name("name", "a b-c.d")
    with pytest.raises(ConfigError, match="is not the name of a folder"):
        check_folder_name("name", name)


# Flags


@pytest.fixture
def parser():
    return KeyParser({name: FIELDS[name] for name in TYPES}, TYPES, {"width": 7}, prog="tool")


@pytest.mark.parametrize("argv, flags, others", [
    (["--width=2", "--width", "3"], {"width": ["2", "3"]}, []), (["--fast"], {"fast": ["True"]}, []),
    (["a.py", "--fast", "b.py"], {"fast": ["True"]}, ["a.py", "b.py"]), (["--fast", "off"], {"fast": ["off"]}, []),
    (["--fast", "--compile"], {"fast": ["True"], "compile": ["True"]}, []),
    (["--peak", "x.py"], {"peak": ["x.py"]}, []), (["--peak", "-x"], {"peak": ["-x"]}, []),
    (["--size", "-1"], {"size": ["-1"]}, []), (["--peak=--"], {"peak": ["--"]}, []),
    (["--peak=a=b c"], {"peak": ["a=b c"]}, []), (["--peak="], {"peak": [""]}, []),
    (["--wdth=2", "x"], {}, ["--wdth=2", "x"]), (["--wid=2"], {}, ["--wid=2"]),
    (["-width=2", "", "-"], {}, ["-width=2", "", "-"]),
])
def test_flags_and_files_may_come_in_any_order(parser, argv, flags, others):
    assert parser.parse_flags(argv) == (flags, others)


@pytest.mark.parametrize("argv", [["--width"], ["--width", "--fast"], ["--width", "a.py"]])
def test_a_flag_that_is_no_boolean_needs_a_value(parser, argv):
    with pytest.raises(UserError, match=r"^--width: needs a value \(--width=…\)$"):
        parser.parse_flags(argv)


def test_help_has_a_heading_per_group_and_the_default_of_every_key(parser):
    text = parser.format_help()
    assert text.index("model:") < text.index("--width=7 ") < text.index("run:") < text.index("--fast=False ")
    assert "step size of 100% of it" in text and "norm [layer | rms]" in text


@pytest.mark.parametrize("width", [80, 100, 200])
def test_help_fits_the_terminal(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    key_parser.cache_clear()
    lines = help_text().splitlines()
    assert max(map(len, lines)) <= min(width, 120) and len(lines) > 100


def test_help_of_one_group_is_its_keys_alone(capsys):
    for name in ("dry run", "dry_run", "DRY-RUN"):
        with pytest.raises(SystemExit) as exited:
            load_config(["--help", name])
        out = capsys.readouterr().out
        assert exited.value.code == 0 and "--dry_run_gpu=" in out and "--seed" not in out and "usage" not in out
    with pytest.raises(SystemExit):
        load_config(["--help"])
    whole = capsys.readouterr().out
    assert "--seed=" in whole and "--help GROUP prints one group: architecture, size," in whole
    with pytest.raises(UserError, match=r"^--help: 'optimisation' is no group \(did you mean optimization\?\)$"):
        load_config(["--help", "optimisation"])


@pytest.mark.parametrize("words, completions", [
    ("train.py --normali", {"--normalization"}), ("train.py --list_p", {"--list_presets"}),
    ("train.py --normalization rms", {"rmsnorm", "rmsnorm_gemma"}), ("train.py --compile T", {"True"}),
    ("train.py --normalization=rms", {"rmsnorm", "rmsnorm_gemma"}),
    ("train.py config/size_d", {"config/size_demo.py"}), ("sample.py --checkpoint b", {"best"})])
def test_the_shell_completes_keys_and_values(tmp_path, words, completions):
    pytest.importorskip("argcomplete")
    variables = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "|", "COMP_LINE": words, "COMP_POINT": str(len(words)),
                 "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "out"), "_ARGCOMPLETE_COMP_WORDBREAKS": " =:"}
    done = run_python(words.split()[0], cwd=ROOT, env=variables)
    assert done.stderr == "" and done.stdout == ""
    assert {word.strip() for word in (tmp_path / "out").read_text().split("|")} == completions


# Files


def test_a_config_file_is_looked_for_here_and_then_in_the_project(tmp_path, monkeypatch):
    project, here = tmp_path / "project", tmp_path / "here"
    for folder in (project / "config", here / "config"):
        folder.mkdir(parents=True)
    (project / "base_of_a_config_file.py").write_text("width = 1")
    (project / "config/one.py").write_text("width = 1")
    (project / "config/two.py").write_text("import os\nfrom base_of_a_config_file import *\n_half = 1\nwidth += _half")
    (here / "config/one.py").write_text("width = 3")
    monkeypatch.chdir(here)
    assert read_config_file("config/one.py", project) == {"width": 3}
    assert read_config_file("config/two.py", project) == {"width": 2}
    with pytest.raises(UserError, match=r"^config/too\.py: no such config file \(did you mean config/two\.py\?\)$"):
        read_config_file("config/too.py", project)
    with pytest.raises(UserError, match=r"^config: not a file"):
        read_config_file("config", project)


def test_whatever_a_config_file_raises_names_its_line(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("a = 1\ndef _f():\n    return a / 0\nb = _f()")
    with pytest.raises(UserError, match=r"bad\.py: line 3: ZeroDivisionError: division by zero"):
        read_config_file(str(path), tmp_path)
