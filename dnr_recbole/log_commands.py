"""The commands ``fit``, ``rank``, ``export`` and ``validate``: request logs and artefacts from the shell."""

from __future__ import annotations

import os
import time
from typing import List, Optional

import pyarrow.parquet as pq
from tqdm import tqdm

from dnr_recbole.artefact import load_artefact, save_artefact
from dnr_recbole.config import Config
from dnr_recbole.config_sources import split_argv
from dnr_recbole.errors import ConfigError, DataError
from dnr_recbole.files import atomic_write
from dnr_recbole.parts.job import rank_parts
from dnr_recbole.quick_start import run_dnr
from dnr_recbole.ranking import OUTPUT, as_table, output_schema, rank_table, together
from dnr_recbole.requestlog.problems import Problems
from dnr_recbole.requestlog.reading import Source
from dnr_recbole.requestlog.request_log import RequestLog, describe_problems
from dnr_recbole.reranker import Reranker


def fit_command(
    log: str, out: str, users: Optional[str], items: Optional[str], start_from: Optional[str], keys: List[str]
) -> None:
    """Train on a log and write the artefact ``out``."""
    if start_from:
        config = Config(argv=[f"--requests={log}", *keys])
        given = {name: config[name] for name in split_argv(keys) if name in config and name != "model"}
        source = RequestLog.read(log, users, items, encoding=config["encoding"] or "utf-8")
        model = Reranker(config["model"], **{"show_progress": True, **given}).fit(source, start_from)
        print(model.report)
        save_artefact(out, model.artefact)
        return
    tables = [f"--{key}={path}" for key, path in (("users_file", users), ("items_file", items)) if path]
    run_dnr(argv=[f"--requests={log}", *tables, f"--artefact_dir={out}", *keys])


def rank_command(artefact: str, requests: str, output: str, k: Optional[int], ray: Optional[str] = None) -> None:
    """Rank the requests of a file of any size into another; progress goes to stderr.

    Args:
        ray: the address of a cluster that ranks a file or folder into a folder, :mod:`dnr_recbole.parts`.

    Raises:
        ConfigError: k is less than 1, or the output is neither parquet nor CSV.
    """
    if k is not None and k < 1:
        raise ConfigError(f"--k={k}: must be at least 1")
    if ray is not None:
        print(rank_parts(artefact, requests, output, k, ray))
        return
    if not output.endswith((".parquet", ".csv")):
        raise ConfigError(f"'{output}': the name must end in .parquet or .csv")
    if os.path.isdir(requests):
        raise ConfigError(f"'{requests}' is a folder: name a file, or rank all its parquet files with --ray")
    model, source = load_artefact(artefact), together(Source(requests))
    started, rows, requests_done, problems = time.time(), 0, 0, Problems()
    with (
        atomic_write(output) as file,
        tqdm(unit=" rows", ncols=100, leave=False, total=source.n_rows, disable=None) as bar,
    ):
        writer = pq.ParquetWriter(file, output_schema(source)) if output.endswith(".parquet") else None
        if writer is None:
            file.write((",".join(OUTPUT) + "\n").encode())
        for frame in rank_table(model, source, k, problems):
            if writer is None:
                frame.to_csv(file, index=False, header=False)
            else:
                writer.write_table(as_table(frame, writer.schema))
            rows += len(frame)
            requests_done += int((frame["rank"] == 0).sum())
            bar.update(len(frame))
        if writer is not None:
            writer.close()
    print(f"{requests_done:,} requests, {rows:,} rows -> {output} in {time.time() - started:.1f} s")
    for problem in problems.notes:
        print(f"note   {problem}")


def export_command(artefact: str, output: str, quantise: Optional[str]) -> None:
    """Write an artefact's scoring as an ONNX file and say how near it is to torch."""
    found = Reranker.load(artefact).export(output, quantise)
    print(
        f"{output}: {len(found.content) / 1e6:.2f} MB, reads {', '.join(found.inputs)}; scores of invented requests "
        f"differ from torch's by {found.difference:.1e} at most"
    )


def validate_command(log: str, keys: List[str]) -> None:
    """Print what a log holds and all that is wrong with it.

    Raises:
        DataError: training would refuse it.
    """
    config = Config(argv=[f"--requests={log}", *keys])
    found, _ = RequestLog.of(config).scan(config)
    print(found.summary())
    text = describe_problems(found)
    if text:
        print(text)
    if found.problems.fatal:
        raise DataError(f"'{log}' has {len(found.problems.fatal)} kinds of errors, training would refuse it")
    print("no error: `dnr-recbole fit` can train on it")
