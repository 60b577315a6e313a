"""What is installed: the property files travel with the package, and the command starts."""

import shutil
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from places import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy, so that no build folder is left in the source tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("dnr_recbole", "properties"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", "out"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return next((source / "out").glob("*.whl"))


def test_wheel_holds_every_property_file_and_module(wheel):
    shipped = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "properties").rglob("*.yaml"):
        assert f"dnr_recbole/properties/{path.relative_to(ROOT / 'properties').as_posix()}" in shipped
    for path in (ROOT / "dnr_recbole").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in shipped
    assert not [name for name in shipped if name.startswith(("tests/", "properties/"))]


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    folder = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
    metadata = archive.read(f"{folder}/METADATA").decode()
    lines = metadata.splitlines()
    python = next(line for line in lines if line.startswith("Requires-Python:"))
    assert "<3.14" in python and ">=3.9" in python
    wanted = [Requirement(line.partition(": ")[2]) for line in lines if line.startswith("Requires-Dist:")]
    by_version = {
        version: {r.name: str(r.specifier) for r in wanted if _applies(r, version)}
        for version in ("3.9", "3.11", "3.12", "3.13")
    }
    for version in ("3.9", "3.11"):
        assert by_version[version]["recbole"] == "==1.2.1" and "<2" in by_version[version]["numpy"]
    for version in ("3.12", "3.13"):  # no installer finds RecBole's ray<=2.6.3 there
        assert not {"recbole", "ray"} & set(by_version[version])
        assert "<" not in by_version[version]["numpy"] and by_version[version]["pandas"].count("<3") == 1
    assert "dnr-recbole = dnr_recbole.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()


def test_the_wheels_for_a_machine_without_network_satisfy_the_requirements(wheel):
    lines = (ROOT / "benchmarks" / "device_requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))).decode().splitlines()
    for line in metadata:
        if line.startswith("Requires-Dist:"):
            wanted = Requirement(line.partition(": ")[2])
            if _applies(wanted, "3.12") and wanted.name in pins:
                assert wanted.specifier.contains(pins[wanted.name]), line
    assert pins["recbole"] == "1.2.1" and {"pandas", "pydantic", "colorlog", "texttable"} <= set(pins)


def test_the_lowest_versions_that_are_tested_are_the_bounds(wheel):
    lines = (ROOT / "tests" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))).decode().splitlines()
    bounds = {}
    for line in metadata:
        wanted = Requirement(line.removeprefix("Requires-Dist: ")) if line.startswith("Requires-Dist:") else None
        if wanted and (_applies(wanted, "3.9") or "serve" in str(wanted.marker) or "gbdt" in str(wanted.marker)):
            for part in wanted.specifier:
                if part.operator == ">=":
                    bounds[wanted.name] = Version(part.version)
    assert {name: Version(pin) for name, pin in pins.items()} == bounds


def _applies(requirement: Requirement, python_version: str) -> bool:
    marker = requirement.marker
    return marker is None or marker.evaluate({"python_version": python_version, "extra": ""})


def test_a_new_python_gets_everything_that_recbole_imports():
    """What RecBole and Ray require and we do not is blocked: all that is used of RecBole imports without it."""
    code = (
        "import sys\n"
        "for name in ('ray', 'thop', 'plotly', 'psutil', 'tabulate', 'hyperopt'): sys.modules[name] = None\n"
        "import dnr_recbole.quick_start, dnr_recbole.registry as registry\n"
        "registry.list_models()\n"
        "for name in ('BPR', 'LightGCN', 'EASE', 'ItemKNN'): registry.get_retriever(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_installed_copy_finds_its_own_properties(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import importlib.resources as r\n"
        "from dnr_recbole.config_schema import properties_dir, load_properties\n"
        "assert properties_dir().parent.name == 'dnr_recbole', properties_dir()\n"
        "assert r.files('dnr_recbole.properties').joinpath('overall.yaml').is_file()\n"
        "assert load_properties(properties_dir() / 'overall.yaml').defaults['dataset'] == 'ml-100k'\n"
    )
    # -P or -I would drop PYTHONPATH; the working directory decides which copy is imported.
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, check=True, timeout=120
    )
