"""Serves the page of a folder on this computer alone, read anew when its files change.

The page asks for `/version` every two seconds and replaces its content if it is another one. A request is answered only
if it is a GET of one of two paths, and its Host is this server: a web page elsewhere that has its name resolve to
127.0.0.1 gets nothing.
"""

import dataclasses
import errno
import hashlib
import sys
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from blockgpt.console import echo
from blockgpt.errors import UserError, error_text
from blockgpt.experiments.arms import arms_without_baseline
from blockgpt.experiments.comparison import compare
from blockgpt.experiments.records import Run
from blockgpt.experiments.report.markup import bullets, escape, script_data
from blockgpt.experiments.report.page import page_of, render_page
from blockgpt.experiments.report.results import Report, report_of_comparison
from blockgpt.experiments.report.studies import report_of_folder
from blockgpt.files import exists, find, is_dir, list_dir

ADDRESS = "127.0.0.1"
REREAD_SECONDS = 300  # whether a run is still running depends on the time, too
UNJUDGED = "Verdicts: compare_architectures.py --baseline NAME, when the runs have ended. This page has the curves."
Load = Callable[[Path], Run]


# ---- the folder ----

def check_folder(folder: Path) -> None:
    """`UserError` unless the folder is a study's or has run directories."""
    if not is_dir(folder):
        raise UserError(f"{folder}: no such folder (the folder of runs, such as runs, or of a study)")
    if exists(folder / "study.json") or exists(folder / "run.json"):
        return
    studies = [path for path in list_dir(folder) if is_dir(path) and exists(path / "study.json")]
    if studies:
        raise UserError(f"{folder}: has studies: watch one of them, such as {studies[0]}")


def run_dirs(folder: Path) -> list[Path]:
    """The run directories in a folder, or the folder itself if it is one."""
    if exists(folder / "run.json"):
        return [folder]
    return [path for path in list_dir(folder) if is_dir(path) and exists(path / "run.json")]


def folder_version(folder: Path, directories: Iterable[Path]) -> str:
    """A digest that changes with every file that a page depends on, and once in REREAD_SECONDS."""
    digest = hashlib.sha256(str(time.time() // REREAD_SECONDS).encode())
    for path in (folder / "study.json", folder / "looks.jsonl", *directories):
        digest.update(f"{path} {file_versions(path)}\n".encode())
    return digest.hexdigest()[:16]


def file_versions(path: Path) -> list[tuple[int, int]]:
    """(time of modification, size) of a file, or of the files of a run; (0, 0) for one that is absent."""
    paths = [path / name for name in ("run.json", "metrics.jsonl", "sweep/attempts.jsonl")] if is_dir(path) else [path]
    return [(status.st_mtime_ns, status.st_size) if (status := find(one)) else (0, 0) for one in paths]


class LivePage:
    """The page of a folder.

    Args:
        folder: of runs, or of a study.
        load_run: reads a run directory.
    """

    def __init__(self, folder: Path, load_run: Load) -> None:
        self.folder, self.load_run = folder, load_run
        self.lock = threading.Lock()
        self.runs: dict[Path, tuple[Any, Run]] = {}
        self.version, self.html = "", ""

    def current_version(self) -> str:
        """The version of the page as the folder is now; that of a mistake is the mistake."""
        try:
            return folder_version(self.folder, run_dirs(self.folder))
        except UserError as error:
            return hashlib.sha256(str(error).encode()).hexdigest()[:16]

    def page(self) -> str:
        """The page, rendered anew if a file has changed. A folder that cannot be read is a page that says so."""
        with self.lock:
            version = self.current_version()
            if version != self.version:
                try:
                    self.html = render_page(self.report(), version)
                except UserError as error:
                    main = (f"<h1>{escape(self.folder)}</h1>\n{bullets([str(error)], 'problems')}"
                            f'<p class="quiet"><span id="live" class="live">live</span></p>'
                            f'<script type="application/json" id="data">{script_data(EMPTY)}</script>')
                    self.html = page_of(str(self.folder), main, version)
                self.version = version
            return self.html

    def report(self) -> Report:
        """What the folder says now."""
        if exists(self.folder / "study.json"):
            return report_of_folder(self.folder, self.load)
        runs = sorted(map(self.load, run_dirs(self.folder)), key=lambda run: str(run["created_at"]), reverse=True)
        comparison = compare(runs)
        comparable = [run for run in comparison["runs"] if run["criterion"] == comparison["criterion"]]
        report = report_of_comparison(comparison, arms_without_baseline(comparable), None, ())
        return dataclasses.replace(report, title=str(self.folder), withheld=UNJUDGED)

    def load(self, directory: Path) -> Run:
        """A run directory, read again if a file of it has changed."""
        version = (file_versions(directory), time.time() // REREAD_SECONDS)
        if self.runs.get(directory, (None,))[0] != version:
            self.runs[directory] = (version, self.load_run(directory))
        return dict(self.runs[directory][1])


EMPTY: dict[str, Any] = {"variants": {}, "colors": 1, "charts": []}


# ---- the server ----

class PageServer(ThreadingHTTPServer):
    """The server of one page. Its threads end with it; one that fails says so in a line.

    Args:
        page: see `LivePage`.
        port: 0 for any that is free.

    Raises:
        UserError: the port is taken, or not allowed.
    """

    daemon_threads = True

    def __init__(self, page: LivePage, port: int) -> None:
        self.page = page
        try:
            super().__init__((ADDRESS, port), PageHandler)
        except OSError as error:
            reason = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used: {error_text(error)}"
            raise UserError(f"--port: {port} {reason} (--port=0 takes one that is free)") from None

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_address[1]}/"

    @property
    def hosts(self) -> set[str]:
        """What a Host header may be."""
        return {f"{name}:{self.server_address[1]}" for name in (ADDRESS, "localhost")}

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):
            echo(f"warning: a request failed: {type(error).__name__}: {error}", sys.stderr)


class PageHandler(BaseHTTPRequestHandler):
    """Answers GET / and GET /version, and nothing else."""

    server: PageServer
    timeout = 30  # seconds for a request to arrive
    server_version, sys_version = "blockGPT", ""
    error_message_format, error_content_type = "%(code)d %(message)s\n", "text/plain; charset=utf-8"

    def parse_request(self) -> bool:
        """Also refuse what is no GET, and what was meant for another host."""
        if not super().parse_request():
            return False
        if self.headers.get_all("Host") is None or self.headers.get_all("Host") != [self.headers["Host"]] or (
                self.headers["Host"] not in self.server.hosts):
            self.send_error(421, "wrong Host")
            return False
        if self.command != "GET":
            self.send_error(405, "only GET")
            return False
        return True

    def do_GET(self) -> None:
        if self.path == "/":
            self.answer(self.server.page.page(), "text/html")
        elif self.path == "/version":
            self.answer(self.server.page.current_version(), "text/plain")
        else:
            self.send_error(404, "not found")

    def answer(self, text: str, content_type: str) -> None:
        content = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", f"{content_type}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not printed."""
