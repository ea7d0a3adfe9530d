"""Check checkpoints bit for bit, one line each. Exit code 0 if all are good, 3 if one is not.

    python -m tools.verify_checkpoint runs/NAME               every checkpoint of a run, and its export
    python -m tools.verify_checkpoint runs/NAME/checkpoints/step_00000250
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
from blockgpt.checkpoints.resume import last_recorded_save
from blockgpt.console import ArgumentParser
from blockgpt.errors import CheckpointError, UserError, exit_on_user_error
from blockgpt.files import exists, is_dir, list_dir, user_path


def check_and_print(path: Path, check: Callable[[], object]) -> bool:
    """Check `path`, a directory or a file, and print the outcome; whether it is good."""
    started = time.perf_counter()
    try:
        check()
    except UserError as error:
        print(f"not ok  {' '.join(str(error).split())}", flush=True)
        return False
    seconds = time.perf_counter() - started
    files = list_dir(path) or [path]
    size = sum(p.stat().st_size for p in files)
    print(f"ok      {path}: {len(files)} file{'s' * (len(files) > 1)}, {size / 1e9:.3f} GB, "
          f"{size / 1e9 / seconds:.2f} GB/s", flush=True)
    return True


def no_checkpoint(run_dir: Path) -> None:
    """Raise the `CheckpointError` for a run without a checkpoint, although its export may be good."""
    saved = last_recorded_save(run_dir)
    raise CheckpointError(f"{run_dir}: has no checkpoint"
                          + (f", but its log says that step {saved} was saved" if saved else ""))


def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("path", type=user_path, help="a checkpoint, or the directory of a run")
    path = parser.parse_args(argv).path
    from blockgpt.checkpoints import checkpoint

    checks: list[tuple[Path, Callable[[], object]]]
    if checkpoint.STEP_DIR.fullmatch(path.name) or exists(path / "manifest.json"):
        checks = [(path, partial(checkpoint.verify, path))]
    elif not is_dir(path):
        raise UserError(f"{path}: is not a directory")
    else:
        checks = [(p, partial(checkpoint.verify, p)) for _, p in reversed(checkpoint.list_checkpoints(path))]
        if exists(path / "model.safetensors"):
            checks.append((path / "model.safetensors", partial(checkpoint.verify_export, path)))
        if not checkpoint.list_checkpoints(path) and (not checks or last_recorded_save(path)):
            checks.append((path, partial(no_checkpoint, path)))
    if not all([check_and_print(target, check) for target, check in checks]):  # a list, so that all are checked
        sys.exit(CheckpointError.exit_code)


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
