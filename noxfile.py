"""Checks in fresh environments: ``nox`` runs all, ``nox -s lint``, ``nox -s tests-3.9`` or ``nox -s lowest`` one.

``nox -s tests-3.11 -- tests/dnr/test_dnr.py -x`` hands arguments to pytest.
"""

from __future__ import annotations

from pathlib import Path

import nox

PYTHONS = ["3.9", "3.10", "3.11", "3.12", "3.13"]
USUAL = "3.11"
WITHOUT_RAY = ("3.12", "3.13")  # RecBole's ray<=2.6.3 exists for no Python above 3.11

nox.options.sessions = ["lint", "types", "docs", "tests", "lowest"]
nox.options.error_on_missing_interpreters = False


def install(session: nox.Session, *more: str, extras: str = "dev") -> None:
    """The package with its extras, and with RecBole where no installer finds what it asks for."""
    session.install("-e", f".[{extras}]", *more)
    if session.python in WITHOUT_RAY:
        session.install("--no-deps", "recbole==1.2.1")
    session.env.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The test suite with the newest dependencies that are allowed."""
    install(session)
    session.run("pytest", *(session.posargs or ["-n", "2"]))


@nox.session(python="3.9")
def lowest(session: nox.Session) -> None:
    """The test suite with the lowest dependencies that are allowed."""
    install(session, "--constraint", "tests/lowest.txt")
    session.run("pytest", *(session.posargs or ["-n", "2"]))


@nox.session(python=USUAL)
def lint(session: nox.Session) -> None:
    """Style and the direction of imports."""
    install(session)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")


@nox.session(python=USUAL)
def types(session: nox.Session) -> None:
    """The type checker."""
    install(session)
    session.run("mypy")


@nox.session(python=USUAL)
def docs(session: nox.Session) -> None:
    """The site; warnings are errors."""
    install(session, extras="docs")
    session.run("mkdocs", "build", "--strict", "--site-dir", str(Path(session.create_tmp()) / "site"))


@nox.session(python=USUAL)
def coverage(session: nox.Session) -> None:
    """Which lines the tests run; slower than the tests alone."""
    install(session)
    arguments = session.posargs or ["-n", "2"]
    session.run("pytest", "--cov", "--cov-report=term-missing:skip-covered", "--cov-report=html", *arguments)
