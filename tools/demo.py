"""The main job in one command, `make demo`: two architectures, the same tokens, which is better.

It runs the commands a user would type and shows each; nothing happens here that cannot be done by hand.
"""

import datetime
import json
import shlex
import subprocess
import sys
from pathlib import Path

from blockgpt.errors import UserError, exit_on_user_error

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "def main("


def run(*command, capture=False):
    """Run a Python command of the project from its root; `UserError` with its last word if it fails."""
    if not capture:
        print("\n$ python " + shlex.join(command), flush=True)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE if capture else None)
    if done.returncode < 0 or done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise UserError(f"python {shlex.join(command)}: exit code {done.returncode}, see above")
    return done.stdout


def train(preset, name):
    """Train a preset at the demo's size and return its run directory."""
    run("train.py", f"config/arch_{preset}.py", "config/size_demo.py", f"--run_name={name}")
    if json.loads((ROOT / "runs" / name / "run.json").read_text())["status"] != "finished":
        raise UserError(f"stopped; the run is kept: python train.py --resume=must --run_name={name}")
    return f"runs/{name}"


def main():
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    print("blockGPT demo: two architectures on this Python's own standard library, a few minutes.")
    if not (ROOT / "data/pycode/meta.json").exists():
        run("data/pycode/prepare.py")
    runs = [train(preset, f"demo-{stamp}-{preset}") for preset in ("gpt2", "llama")]

    comparison = json.loads(run("compare_architectures.py", *runs, "--format=json", capture=True))
    better, worse = comparison["runs"]
    python = Path(sys.executable)
    python = python.relative_to(ROOT) if python.is_relative_to(ROOT) else python

    def ratio(key):
        return f"{better[key] / worse[key]:.2f}"

    print("\n" + "=" * 78)
    run("compare_architectures.py", *runs)
    run("sample.py", f"--run={better['path']}", f"--prompt={PROMPT}", "--max_new_tokens=200", "--top_k=50", "--seed=1")
    print(f"""
What was learned: after the same {better['tokens'] / 1e6:.1f}M tokens,
  {better['architecture']} needs {better['val_bpb']:.2f} bits for a byte of Python it has not seen, and
  {worse['architecture']} needs {worse['val_bpb']:.2f}. The better one takes \
{1 - better['val_bpb'] / worse['val_bpb']:.0%} fewer bits with {ratio('parameters')} × the parameters,
  at {ratio('tokens_per_sec')} × the tokens per second. One seed each: of this size, not of every size.
What to type next ({python} is the one with the packages):
  {python} train.py config/arch_gpt2.py config/size_demo.py --norm_position=pre     # was it the post-norm?
  {python} train.py config/arch_llama.py config/size_demo.py --seed=2               # was it the seed?
  {python} compare_architectures.py --latest 4
  {python} train.py --help""")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
