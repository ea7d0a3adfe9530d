"""`make demo`: trains two architectures on the same tokens and prints which one is better.

It prints and runs the commands that a user would type, and nothing else.
"""

import datetime
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
from blockgpt.errors import UserError, exit_on_user_error
from blockgpt.files import exists

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "def main("


def run(*command: str, capture: bool = False) -> str:
    """Run a Python command from the project's root.

    Args:
        command: what follows `python`.
        capture: return its output, and do not print the command.

    Raises:
        UserError: the command failed. Its own error is already on the terminal.
        KeyboardInterrupt: the command was interrupted.
    """
    if not capture:
        print("\n$ python " + shlex.join(command), flush=True)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE if capture else None)
    if done.returncode < 0 or done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise UserError(f"python {shlex.join(command)}: exit code {done.returncode}, see above")
    return done.stdout or ""


def train_preset(preset: str, name: str) -> str:
    """Train a preset at the size of the demo. Returns its run directory."""
    run("train.py", f"config/arch_{preset}.py", "config/size_demo.py", f"--run_name={name}")
    if json.loads((ROOT / "runs" / name / "run.json").read_text())["status"] != "finished":
        raise UserError(f"run {name} is not finished; continue it: python train.py --resume=must --run_name={name}")
    return f"runs/{name}"


def main() -> None:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    print("blockGPT demo: two architectures on the standard library of this Python. It takes a few minutes.")
    if not exists(ROOT / "data/pycode/meta.json"):
        run("data/pycode/prepare.py")
    runs = [train_preset(preset, f"demo-{stamp}-{preset}") for preset in ("gpt2", "llama")]

    comparison = json.loads(run("compare_architectures.py", *runs, "--format=json", capture=True))
    better, worse = comparison["runs"]
    print("\n" + "=" * 78)
    run("compare_architectures.py", *runs)
    run("sample.py", f"--run={better['path']}", f"--prompt={PROMPT}", "--max_new_tokens=200", "--top_k=50", "--seed=1")
    python = Path(sys.executable)
    print(result_text(better, worse, python.relative_to(ROOT) if python.is_relative_to(ROOT) else python))


def result_text(better: dict[str, Any], worse: dict[str, Any], python: Path) -> str:
    """The result in words, and the commands to type next. better, worse: runs of the comparison as JSON."""
    def ratio(key: str) -> str:
        return f"{better[key] / worse[key]:.2f}"

    return f"""
Result: after the same {better['tokens'] / 1e6:.1f}M tokens,
  {better['architecture']} needs {better['val_bpb']:.2f} bits per byte of Python code that it has not seen, and
  {worse['architecture']} needs {worse['val_bpb']:.2f}. The better one needs \
{1 - better['val_bpb'] / worse['val_bpb']:.0%} fewer bits with {ratio('parameters')} × the parameters
  and {ratio('tokens_per_sec')} × the tokens per second. With one seed each, this holds for this size only.
What to type next ({python} has the packages installed):
  {python} train.py config/arch_gpt2.py config/size_demo.py --norm_position=pre     # was it the post-norm?
  {python} train.py config/arch_llama.py config/size_demo.py --seed=2               # was it the seed?
  {python} compare_architectures.py --latest 4
  {python} train.py --help"""


if __name__ == "__main__":
    with exit_on_user_error():
        main()
