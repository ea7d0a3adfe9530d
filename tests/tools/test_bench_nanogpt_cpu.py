"""The benchmark against nanoGPT: the ratio that it prints, and its answers to mistakes. Nothing is trained."""

import pytest

from blockgpt.errors import UserError
from tools import bench_nanogpt_cpu as bench


@pytest.fixture
def checkout(tmp_path):
    """A directory that looks like a nanoGPT checkout with its data prepared."""
    (tmp_path / "data/shakespeare_char").mkdir(parents=True)
    (tmp_path / "data/shakespeare_char/train.bin").touch()
    return tmp_path


def test_the_ratio_is_blockgpts_time_divided_by_nanogpts(monkeypatch, capsys, checkout):
    seconds = iter([10.0, 8.0, 10.0, 9.0, 10.0, 7.0])
    monkeypatch.setattr(bench, "time_training", lambda command, cwd, pattern: (next(seconds), 1.5))
    bench.main([f"--nanogpt={checkout}", "--pairs=3"])
    assert capsys.readouterr().out.splitlines()[-1] == (
        "blockGPT / nanoGPT, wall time: median 0.800, min 0.700, max 0.900")


def test_the_last_printed_loss_is_returned(tmp_path):
    seconds, loss = bench.time_training(["-c", "print('val loss 4.5'); print('val loss 1.25')"], tmp_path,
                                        r"val loss ([\d.]+)")
    assert loss == 1.25 and seconds > 0


@pytest.mark.parametrize("code, reason", [("raise SystemExit('no data')", "no data"),
                                          ("print('done')", "no validation loss was printed")])
def test_a_failed_training_is_a_user_error(tmp_path, code, reason):
    with pytest.raises(UserError, match=reason):
        bench.time_training(["-c", code], tmp_path, r"val loss ([\d.]+)")


def test_mistakes_in_the_flags_are_user_errors(tmp_path, checkout):
    with pytest.raises(UserError, match=r"--nanogpt: .*train.bin does not exist \(run python "):
        bench.main([f"--nanogpt={tmp_path / 'none'}"])
    with pytest.raises(UserError, match="--pairs: 0 is out of range, must be at least 1"):
        bench.main([f"--nanogpt={checkout}", "--pairs=0"])
