"""A pytest plugin that keeps outcome and message of every test, by test class, in the file DNR_CONTRACT_FILE."""

from __future__ import annotations

import json
import os
from pathlib import Path

_classes: dict = {}


def pytest_runtest_logreport(report) -> None:
    """Called in the main process for every phase of every test, whichever process ran it."""
    if os.environ.get("PYTEST_XDIST_WORKER") or (report.when != "call" and not report.failed):
        return
    _, *parts = report.nodeid.split("::")
    name = parts[0] if len(parts) > 1 else "functions"
    entry = _classes.setdefault(name, {"passed": 0, "failed": [], "seconds": 0.0})
    entry["seconds"] += report.duration
    if report.passed:
        entry["passed"] += 1
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = str(getattr(crash, "message", report.longrepr)).strip()
        entry["failed"].append({"test": parts[-1], "message": message[:600]})
    if report.failed or sum(c["passed"] for c in _classes.values()) % 50 == 0:
        _write()


def pytest_sessionfinish(session) -> None:
    if not os.environ.get("PYTEST_XDIST_WORKER"):
        _write()


def _write() -> None:
    """Also in between: a run that is cut off leaves what it had found."""
    path = Path(os.environ["DNR_CONTRACT_FILE"])
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"classes": _classes, "done": False}, indent=1))
    temporary.replace(path)
