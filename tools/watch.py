"""The page of `--report`, live: learning curves and tables of runs while they go on.

    python -m tools.watch                          the runs in runs/
    python -m tools.watch ablations/arch_gpt2      a study

Serves it on this computer alone, at the URL that it prints; Ctrl-C ends it. The page follows the run directories by
itself. A study has verdicts as soon as tools.ablate has recorded a look at its results, see docs/EXPERIMENTS.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
from blockgpt.console import ArgumentParser, check_ranges, echo
from blockgpt.errors import exit_on_user_error
from blockgpt.experiments.report.live import LivePage, PageServer, check_folder
from blockgpt.files import user_path
from compare_architectures import load_run


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m tools.watch", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=user_path, default="runs",
                        help="of runs, or of a study (default: runs)")
    parser.add_argument("--port", type=int, default=8765, help="0: one that is free (default: 8765)")
    args = parser.parse_args(argv)
    check_ranges(args, {"port": (0 <= args.port < 65536, "from 0 to 65535")})
    folder: Path = args.folder
    check_folder(folder)
    with PageServer(LivePage(folder, load_run), args.port) as server:
        echo(f"{server.url}   {folder}   (Ctrl-C ends it)")
        server.serve_forever()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
