"""The report pulls: it reads a finished or interrupted run folder and pushes nothing into the run.

    facts    the run folder as frozen values, and report.json (the stable contract)
    events   what happened besides training, as rows and as marks in pictures
    reach    the frontier of the run's budgets, from the plan that it recorded
    charts   those values as inline SVG; `grid` and `frontier` draw one picture each
    page     numbers as text, and the one self-contained page

matplotlib and jinja2 are imported only when a page is made.
"""

from __future__ import annotations

import json
from pathlib import Path

from edgegt.disk import write_text
from edgegt.report.facts import build_report, read_facts

__all__ = ["write_report"]


def write_report(run_dir: Path) -> Path:
    """Write report.json and report.html into a run folder, each whole or not at all, and return the page's path.

    The first time also frontier.json, where the folder holds what it takes.

    Raises: InputError when `run_dir` is no run folder; DiskError when it cannot be written.
    """
    facts = read_facts(Path(run_dir))
    report = build_report(facts)
    from edgegt.report.page import render
    from edgegt.report.reach import FILE, frontier_of_run

    frontier = frontier_of_run(facts)
    if frontier is not None:
        write_text(facts.folder / FILE, json.dumps(frontier.to_json()) + "\n")
    write_text(facts.folder / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    page = facts.folder / "report.html"
    write_text(page, render(facts, report, frontier))
    return page
