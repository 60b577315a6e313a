"""What is installed: the property files travel with the package, and the command starts."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


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
    assert "<3.12" in python and ">=3.9" in python
    assert "Requires-Dist: recbole==1.2.1" in lines
    numpy = next(line for line in lines if line.startswith("Requires-Dist: numpy"))
    assert "<2" in numpy
    assert "dnr-recbole = dnr_recbole.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()


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
