"""`--report`: a study as one HTML page without network. Judgement and words are those of verdicts.py, verdict_text.py.

To add a section: a function of a `Report` that gives its HTML (results.py, provenance.py), and a line in `SECTIONS`.
"""

import base64
import datetime
import functools
import hashlib
import os
from pathlib import Path

from blockgpt.errors import UserError, error_text
from blockgpt.experiments.report.curves import PALETTE
from blockgpt.experiments.report.markup import escape, script_data, section
from blockgpt.experiments.report.provenance import (
    commands_section,
    configs_section,
    environment_section,
    limits_section,
    notes_section,
    runs_section,
    unfinished_section,
)
from blockgpt.experiments.report.results import (
    Report,
    arms_section,
    curves_section,
    effects_section,
    front_section,
    metric_text,
    verdicts_section,
)
from blockgpt.files import is_dir, write_bytes

SUFFIXES = (".html", ".htm")
SECTIONS = (  # (title, name, content); curves have a place of their own between the second and the third
    ("Not finished", "unfinished", unfinished_section), ("Verdicts", "verdicts", verdicts_section),
    ("All variants", "variants", arms_section), ("Learning curves", "curves", None),
    ("Effects", "effects", effects_section), ("Loss, speed, memory", "front", front_section),
    ("Configurations", "configurations", configs_section), ("Hardware, versions, data", "environment",
                                                            environment_section),
    ("Runs", "runs", runs_section), ("Warnings and notes", "notes", notes_section),
    ("Limits", "limits", limits_section), ("Reproduce", "reproduce", commands_section))


@functools.cache
def asset(name: str) -> str:
    """A file that lies beside this module."""
    return (Path(__file__).parent / name).read_text()


def render_main(report: Report, live: bool) -> str:
    """The content of the page, with the values of its curves: what a live page replaces."""
    curves, data = curves_section(report)
    now = datetime.datetime.now().astimezone()
    finished = sum(trial.status == "finished" for trial in report.study.trials)
    commits = {str(run["environment"]["git_commit"])[:12] for run in report.runs if "git_commit" in run["environment"]}
    facts_line = [f"{finished} of {len(report.study.trials)} runs finished", metric_text(report),
                  *([f"baseline {report.baseline}"] if report.baseline else []),
                  *([f"code {', '.join(sorted(commits)[:3])}"] if commits else []), f"{now:%Y-%m-%d %H:%M %Z}"]
    head = (f'<header><p class="name">{escape(report.title if report.question else "blockGPT")}</p>'
            f"<h1>{escape(report.question or report.title)}</h1>"
            f'<p class="quiet">{escape(" · ".join(facts_line))}'
            + (' · <span id="live" class="live">live</span>' if live else "") + "</p></header>\n")
    body = "".join(section(title, curves if build is None else build(report), name) for title, name, build in SECTIONS)
    variants = {str(index): name for name, index in report.colors.items()}
    values = script_data({"variants": variants, "colors": len(PALETTE), "charts": data})
    return f'{head}{body}<script type="application/json" id="data">{values}</script>'


def render_page(report: Report, version: str | None = None) -> str:
    """The whole page of a report; `version`: see `page_of`."""
    return page_of(report.question or report.title, render_main(report, version is not None), version)


def page_of(title: str, main: str, version: str | None = None) -> str:
    """A page with its content. It loads nothing: a content security policy forbids all but its own style and script.

    Args:
        main: HTML that ends with the values of the curves.
        version: of a page that is served live, which asks whether there is another one.
    """
    live = "" if version is None else f' data-live="{escape(version)}"'
    script = asset("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'" + (
        "; connect-src 'self'" if live else "")
    colors = "".join(f".v{i}{{--c:{color}}}" for i, color in enumerate(PALETTE))
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(title)}</title>\n<style>\n{asset('style.css')}{colors}</style>\n"
            f'</head><body{live}>\n<button type="button" id="theme" class="screen-only">theme: auto</button>\n'
            f"<main>\n{main}</main>\n<script>{script}</script></body></html>\n")


def check_report(path: str) -> None:
    """Refuse before any run what could not be written after it.

    Raises:
        UserError: the name's ending is none of SUFFIXES, or its folder cannot be written.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise UserError(f"--report: {path}: its ending must be one of {', '.join(SUFFIXES)}")
    folder = Path(path).parent
    if not is_dir(folder):
        raise UserError(f"--report: {path}: no such folder: {folder} (create it)")
    if is_dir(path):
        raise UserError(f"--report: {path}: is a folder (name a file)")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--report: {path}: cannot be written: no permission for {folder}")


def save_report(path: str, report: Report) -> None:
    """Write the page of a report, whole or not at all; `UserError` if it cannot be written."""
    check_report(path)
    try:
        write_bytes(path, render_page(report).encode())
    except OSError as error:
        raise UserError(f"--report: {path}: cannot be written: {error_text(error)}") from None
