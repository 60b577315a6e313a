"""Packaging. The top-level folder `properties/` is installed as the package `dnr_recbole.properties`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
INIT = (ROOT / "dnr_recbole" / "_version.py").read_text(encoding="utf-8")
VERSION = re.search(r'__version__ = "(.+?)"', INIT).group(1)
README = ROOT / "README.md"

# RecBole asks for ray<=2.6.3, which exists for no Python above 3.11, so an installer refuses RecBole itself there. It
# runs without Ray: above 3.11 `pip install --no-deps recbole==1.2.1` follows, and what it imports is listed here.
OLD, NEW = "; python_version < '3.12'", "; python_version >= '3.12'"

INSTALL_REQUIRES = [
    "recbole==1.2.1" + OLD,  # compat.py is written for this version
    "ray[tune]<=2.6.3" + OLD,  # RecBole's bound; later versions changed what its tuning calls
    "pyarrow>=16,<26" + OLD,  # needed by ray.tune; 26 refuses numpy 1, and before 16 a file could not end with counts
    "numpy>=1.22,<2" + OLD,  # Ray 2.6.3 uses names that numpy 2 removed
    "colorama==0.4.4" + OLD,  # RecBole's own pin
    "numpy>=1.26" + NEW,
    "pyarrow>=16" + NEW,  # files of values per request
    "colorama" + NEW,
    "colorlog==4.7.2" + NEW,
    "scikit-learn" + NEW,
    "tensorboard" + NEW,
    "texttable" + NEW,
    "torch>=2.1,<2.14",
    "pandas>=1.3,<3",  # RecBole's in-place fillna silently does nothing under pandas 3
    "scipy>=1.9",
    "pydantic>=2.8",
    "safetensors>=0.4",
    "filelock>=3.4",
    "pyyaml>=5.1",
    "tqdm>=4.48.2",
    "hyperopt==0.2.5",  # later versions break RecBole's exhaustive search
    "setuptools<82",  # Ray 2.6.3 and hyperopt import pkg_resources, which 82 dropped
]
REPORT = ["matplotlib>=3.5", "markdown>=3.3"]
SERVE = ["fastapi>=0.110", "uvicorn>=0.23", "prometheus-client>=0.16"]
MLFLOW = ["mlflow-skinny>=2.9", "sqlalchemy>=1.4", "alembic"]  # the last two for its local store
EXPORT = ["onnx>=1.16", "onnxruntime>=1.18"]
EXTRAS = {
    "faiss": ["faiss-cpu"],
    "gbdt": ["lightgbm>=4.1"],
    "mlflow": MLFLOW,
    "serve": SERVE,
    "wandb": ["wandb"],
    "report": REPORT,
    "export": EXPORT,
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10", "mkdocstrings[python]>=0.26,<2"],
    "dev": [
        *MLFLOW,
        *SERVE,
        *REPORT,
        *EXPORT,
        "pytest>=7",
        "pytest-cov",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "import-linter",
        "lightgbm>=4.1",
        "ir-measures",
        "pytrec-eval-terrier",
        "wheel",
        "zstandard",
        "httpx",
        "schemathesis>=4",
        "selenium>=4.10",
        "wandb",
        "mypy>=1.11,<3",
        "pandas-stubs",
        "types-PyYAML",
        "types-tqdm",
    ],
}

setup(
    name="dnr_recbole",
    version=VERSION,
    description="Neural re-ranking with denoising training (DNR) for two-stage recommenders, on RecBole",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.9,<3.14",
    packages=[*find_packages(include=["dnr_recbole", "dnr_recbole.*"]), "dnr_recbole.properties"],
    package_dir={"dnr_recbole.properties": "properties"},
    package_data={"dnr_recbole": ["py.typed", "serving/page.html"], "dnr_recbole.properties": ["*.yaml", "*/*.yaml"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["dnr-recbole = dnr_recbole.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3.9",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)
