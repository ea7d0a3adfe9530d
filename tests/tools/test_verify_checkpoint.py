"""tools.verify_checkpoint: one line for each checkpoint and the export, and the exit code."""

import pytest
from checkpoint_helpers import MODEL, flip, saved_run

from blockgpt.checkpoints import checkpoint
from blockgpt.errors import exit_on_user_error
from tools.verify_checkpoint import main


@pytest.fixture
def verify_checkpoint(capsys):
    """verify_checkpoint(path) -> (exit code, lines on stdout, lines on stderr)."""
    def run(path):
        with pytest.raises(SystemExit) as exited, exit_on_user_error():
            main([str(path)])
            raise SystemExit(0)
        out, err = capsys.readouterr()
        return exited.value.code, out.splitlines(), err.splitlines()
    return run


def test_each_checkpoint_and_the_export_have_a_line(tmp_path, verify_checkpoint):
    run = saved_run(tmp_path)
    checkpoint.export(run.dir, run.newest, {})
    code, lines, _ = verify_checkpoint(run.dir)
    assert code == 0 and [line.split(":")[0] for line in lines] == [
        f"ok      {path}" for path in (run.older, run.newest, run.dir / "model.safetensors")]
    assert all(line.endswith(" GB/s") for line in lines) and " 5 files, 0.000 GB, " in lines[0]
    flip(run.older / MODEL, -1)
    flip(run.dir / "model.safetensors", -1)
    code, lines, _ = verify_checkpoint(run.dir)
    assert code == 3 and [line.split()[0] for line in lines] == ["not", "ok", "not"]
    assert lines[0] == f"not ok  {run.older / MODEL}: is damaged (its sha256 is not the manifest's)"
    assert verify_checkpoint(run.newest)[0] == 0 and verify_checkpoint(run.older)[0] == 3
    assert verify_checkpoint(run.folder / "step_00000009")[:2] == (
        3, [f"not ok  {run.folder / 'step_00000009'}: does not exist"])


def test_a_path_without_checkpoints_is_an_error(tmp_path, verify_checkpoint):
    assert verify_checkpoint(tmp_path) == (3, [f"not ok  {tmp_path}: has no checkpoint"], [])
    assert verify_checkpoint(tmp_path / "nowhere") == (2, [], [f"error: {tmp_path / 'nowhere'}: is not a directory"])
