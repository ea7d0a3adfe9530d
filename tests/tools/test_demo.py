"""make demo: the commands that it runs, what it concludes, and what it says if a command fails."""

import json
from pathlib import Path

import pytest

from blockgpt.errors import UserError
from tools import demo


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """The commands that the demo runs, none of which is started. The first entry holds the status of the runs."""
    commands = []

    def run(*command, capture=False):
        commands.append(command)
        if command[0] == "train.py":
            name = command[-1].removeprefix("--run_name=")
            (tmp_path / "runs" / name).mkdir(parents=True)
            (tmp_path / "runs" / name / "run.json").write_text(json.dumps({"status": run.status}))
        losses = {"llama": 2.0, "gpt2": 2.5}
        runs = [dict(path=f"runs/{name}", architecture=name.upper(), tokens=1.6e6, val_bpb=bpb, parameters=1e6 * bpb,
                     tokens_per_sec=1e4) for name, bpb in losses.items()]
        return json.dumps({"runs": runs})

    run.status = "finished"
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "run", run)
    commands.append(run)
    return commands


def test_the_demo_trains_two_presets_compares_them_and_samples_from_the_better_one(commands, capsys):
    demo.main()
    assert [command[0] for command in commands[1:]] == [
        "data/pycode/prepare.py", "train.py", "train.py", "compare_architectures.py", "compare_architectures.py",
        "sample.py"]
    assert "config/arch_gpt2.py" in commands[2] and "config/arch_llama.py" in commands[3]
    assert "--run=runs/llama" in commands[6]
    out = capsys.readouterr().out
    assert "LLAMA needs 2.00 bits per byte" in out and "GPT2 needs 2.50" in out
    assert "20% fewer bits with 0.80 × the parameters" in out and "1.00 × the tokens per second" in out


def test_every_file_of_a_command_exists():
    root = Path(demo.__file__).resolve().parent.parent
    for name in ("data/pycode/prepare.py", "train.py", "compare_architectures.py", "sample.py",
                 "config/arch_gpt2.py", "config/arch_llama.py", "config/size_demo.py"):
        assert (root / name).is_file()


def test_an_interrupted_training_run_ends_the_demo_with_the_command_that_continues_it(commands):
    commands[0].status = "interrupted"
    with pytest.raises(UserError, match=r"not finished; continue it: python train\.py --resume=must --run_name="):
        demo.main()


def test_a_command_that_fails_is_named_with_its_exit_code(capsys):
    with pytest.raises(UserError, match=r"python -c 'raise SystemExit\(3\)': exit code 3, see above"):
        demo.run("-c", "raise SystemExit(3)")
    with pytest.raises(KeyboardInterrupt):
        demo.run("-c", "raise SystemExit(130)", capture=True)
    assert demo.run("-c", "print(1)", capture=True) == "1\n"
    assert capsys.readouterr().out == "\n$ python -c 'raise SystemExit(3)'\n"
