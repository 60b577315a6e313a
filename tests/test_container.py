"""The container's recipe names what there is; `container/try_without_engine.sh` runs it."""

from __future__ import annotations

import json
import re
import subprocess

from places import ROOT

RECIPE = (ROOT / "container" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")


def steps(word):
    return re.findall(rf"^ *(?:{word}) +(.*)$", RECIPE, re.M)


def test_everything_that_is_copied_is_there_and_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [name for step in steps("COPY") for name in step.split()[:-1]]
    assert {"setup.py", "dnr_recbole", "properties"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists() and f"!{name}" in ignored
    assert "*" in ignored, "nothing else goes into an image"


def test_versions_extras_and_ports_fit():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    (extras,) = re.findall(r'^ARG EXTRAS="(.*)"$', RECIPE, re.M)
    assert all(f'"{extra}":' in setup for extra in extras.split(","))
    (torch,) = re.findall(r'"(torch[^"]*)"', RECIPE)
    assert f'"{torch}"' in setup
    (python,) = re.findall(r"^FROM python:(.*)-slim$", RECIPE, re.M)
    assert f"Python :: {python}" in setup
    (port,) = steps("EXPOSE")
    assert f"--port={port}" in json.loads(steps("CMD")[-1])
    (health,) = re.findall(r"^HEALTHCHECK .*? CMD +(.*)$", RECIPE, re.M)
    assert f"127.0.0.1:{port}/health" in json.loads(health)[-1]
    (program, command) = json.loads(steps("ENTRYPOINT")[0])
    assert f"{program} = dnr_recbole.cli:main" in setup and command == "serve"
    (user,) = steps("USER")
    assert int(user) > 0, "no root"
    docs = (ROOT / "docs" / "container.md").read_text(encoding="utf-8")
    (record,) = set(re.findall(r"--record=(/\S+)", docs))
    assert f":{record} " in docs and any(f"mkdir {record} && chown {user} {record}" in step for step in steps("RUN"))


def test_the_script_reads():
    subprocess.run(["bash", "-n", str(ROOT / "container" / "try_without_engine.sh")], check=True)
