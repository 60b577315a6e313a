"""Load a dataset, and say in one line what is wrong with it if that fails.

Which files a run reads is known before any is opened (:func:`data_files`), so that whatever is stored can be identified
by the files that it depends on.
"""

from __future__ import annotations

from logging import getLogger
from pathlib import Path
from typing import Dict, List
from urllib.error import URLError

from dnr_recbole.config_schema import Keys, read_yaml, recbole_properties_dir
from dnr_recbole.data.atomic_dataset import AtomicDataset
from dnr_recbole.data.columns import check_data_keys, inter_paths, list_folder, used_side_files
from dnr_recbole.data.features import side_features
from dnr_recbole.errors import DataError, closest
from dnr_recbole.identity import FileDigests, file_digest


def load_recbole_dataset(config: Keys) -> AtomicDataset:
    """The dataset of `config`, read, filtered and checked, its `inter_feat` still a pandas frame.

    Raises:
        ConfigError: a key about the data is not written as it must be.
        DataError: it is missing, damaged, lacks a needed column, or nothing is left after filtering.
    """
    data_files(config)
    name, folder = config["dataset"], config["data_path"]
    try:
        dataset = AtomicDataset(config)
    except (ValueError, KeyError, IndexError, TypeError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"dataset '{name}' in '{folder}' cannot be read: {reason}") from error
    n, items = config["n_candidates"], dataset.item_num - 1
    if items < n:
        raise DataError(f"dataset '{name}' has {items} items, fewer than n_candidates={n}: lower n_candidates")
    side_features(config, dataset)  # what is wrong with them is said now, not after stage 1
    return dataset


def data_files(config: Keys) -> Dict[str, List[Path]]:
    """The files that the numbers of a run depend on, by the scope that reads them; none is opened.

    ``source``: interactions, and side files that filter them or that the retriever reads. ``reranker``: side files that
    `use_features` reads. A known dataset that is not there is downloaded first, if the user agrees.

    Raises:
        ConfigError: a key about the data is not written as it must be.
        DataError: a file is missing and cannot be downloaded.
    """
    check_data_keys(config)
    if config["source"] != "recbole":
        return {"source": [], "reranker": []}
    name, folder = config["dataset"], Path(config["data_path"])
    if not folder.is_dir():
        _check_downloadable(name, folder)
        _download(config, name, folder)
    source = inter_paths(config)
    for path in source:
        if not path.is_file():
            own = sorted(p.name for p in folder.glob(f"{name}.*.inter"))
            hint = f"set benchmark_filename to read {', '.join(own)}, or " if own else ""
            where = f"'{path}' does not exist ('{folder}' holds {list_folder(folder)})"
            raise DataError(f"{where}: {hint}{_remedy(name, folder)}")
    files = used_side_files(config)
    return {"source": source + sorted({*files["filters"], *files["retriever"]}), "reranker": files["reranker"]}


def file_digests(config: Keys) -> FileDigests:
    """sha256 of each of the :func:`data_files`, by scope and name; no entry for a scope that reads none."""
    return {
        scope: {path.name: file_digest(path) for path in paths} for scope, paths in data_files(config).items() if paths
    }


def _check_downloadable(name: str, folder: Path) -> None:
    known = read_yaml(recbole_properties_dir() / "dataset" / "url.yaml")
    if name in known:
        return
    others = [entry.name for entry in folder.parent.glob("*") if entry.is_dir()]
    hint = closest(name, ["ml-100k", "ml-1m", "amazon-books", "kuaivideo", "synthetic", *others])
    raise DataError(f"{_absent(name, folder)}: {hint + ' Otherwise ' if hint else ''}{_remedy(name, folder)}")


def _download(config: Keys, name: str, folder: Path) -> None:
    """RecBole's own download, which asks first."""
    dataset = AtomicDataset.__new__(AtomicDataset)  # reading begins in its __init__
    dataset.config, dataset.dataset_name, dataset.dataset_path = config, name, str(folder)
    dataset.logger = getLogger(__name__)
    try:
        dataset._download()
    except URLError as error:
        why = f"{_absent(name, folder)} and cannot be downloaded ({error.reason})"
        raise DataError(f"{why}: {_remedy(name, folder)}") from None
    except (EOFError, SystemExit):
        why = f"{_absent(name, folder)} and the download was declined"
        raise DataError(f"{why}: {_remedy(name, folder)}") from None
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"dataset '{name}' cannot be downloaded to '{folder}': {reason}") from error


def _absent(name: str, folder: Path) -> str:
    return f"dataset '{name}' is not in '{folder}'"


def _remedy(name: str, folder: Path) -> str:
    return (
        f"put the atomic file '{folder / (name + '.inter')}' there, "
        "tab-separated with the header 'user_id:token item_id:token rating:float timestamp:float'"
    )
