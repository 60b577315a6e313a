"""Command line: ``dnr-recbole fit|rank|evaluate|export|validate|convert|serve|run|tune|…``; ``--help`` lists all.

Exit codes: 0 success; 1 the data, the disk or a checkpoint is at fault; 2 the command is; 128 + n ended by signal n,
so 130 after Ctrl-C and 143 after SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import List, Optional

from dnr_recbole.errors import DnrError
from dnr_recbole.serving.command import add_serve
from dnr_recbole.signals import interruptible
from dnr_recbole.threads import be_a_good_neighbour

_EPILOG = "Every key of the configuration is an option: --key=value. `dnr-recbole keys --model=DNR` lists them."
# What to do after an interruption.
_GO_ON = {
    "run": "; run again with --resume to go on from the last finished epoch",
    "tune": "; run the same command again: trials start anew, the retriever and the candidates are kept",
    "compare": "; run the same command again to go on: finished runs are kept",
    "rank": "; run the same command again: with --ray, finished parts are kept",
}


def main(argv: Optional[List[str]] = None) -> int:
    """Run a command; returns the exit code and prints expected failures as one line on stderr."""
    be_a_good_neighbour()  # before any command imports torch
    parser = argparse.ArgumentParser("dnr-recbole", description="Neural re-ranking on top of RecBole.", epilog=_EPILOG)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "run", help="train a retriever and a reranker, evaluate, report",
        epilog="dnr-recbole run --model=DNR --dataset=ml-100k --artefact_dir=my_model. " + _EPILOG,
    )  # fmt: skip
    _add_log_commands(commands)
    tune = commands.add_parser("tune", help="search hyper-parameters", epilog=_EPILOG)
    tune.add_argument(
        "--tool", type=str.lower, choices=["hyperopt", "ray"], default="hyperopt", help="default: hyperopt"
    )
    tune.add_argument("--params_file", help="RecBole's parameter file; default: the ranges in the model's YAML")
    tune.add_argument("--search", help="comma-separated keys to search; default: all that have a range")
    tune.add_argument("--algo", choices=["exhaustive", "random", "bayes"], default="random", help="default: random")
    tune.add_argument("--max_evals", type=int, default=20, help="number of trials (default: 20)")
    tune.add_argument("--output_file", default="hyper_result.json", help="where all trials are written")
    tune.add_argument("--cpus_per_trial", type=float, default=1.0, help="ray: CPUs of a trial (default: 1)")
    tune.add_argument("--gpus_per_trial", type=float, default=0.0, help="ray: GPUs of a trial (default: 0)")
    _add_ray(tune, "with --tool=ray: search")
    compare = commands.add_parser("compare", help="run a plan of many rerankers, settings and seeds")
    compare.add_argument("plan", help="YAML file, see docs/compare.md")
    compare.add_argument("results", help="JSON lines; finished runs found there are not repeated")
    _add_ray(compare, "make each run")
    compare.add_argument("--cpus_per_run", type=float, default=1.0, help="ray: CPUs of a run (default: 1)")
    compare.add_argument("--gpus_per_run", type=float, default=0.0, help="ray: GPUs of a run (default: 0)")
    report = commands.add_parser("report", help="write one report of several plans, with plots")
    report.add_argument("spec", help="YAML file, see docs/compare.md")
    report.add_argument("markdown", help="file to write: the tables")
    report.add_argument("page", help="file to write: HTML with the plots")
    table = commands.add_parser("table", help="print the tables of a plan's results as Markdown")
    table.add_argument("plan")
    table.add_argument("results")
    significance = commands.add_parser("significance", help="test whether two runs differ, by their per_request_file")
    significance.add_argument("first", metavar="A.parquet")
    significance.add_argument("second", metavar="B.parquet")
    significance.add_argument("--metrics", help="comma-separated; default: all that both files have")
    significance.add_argument("--over", choices=["users", "requests"], default="users", help="unit (default: users)")
    commands.add_parser("models", help="list rerankers and retrievers")
    keys = commands.add_parser("keys", help="list the keys of a run, e.g. --model=DNR --backbone=PIER", epilog=_EPILOG)
    keys.add_argument("--format", choices=["text", "markdown"], default="text", help="default: text")
    given = sys.argv[1:] if argv is None else argv
    # Its address is optional: what follows a blank is an argument of its own.
    arguments, rest = parser.parse_known_args(["--ray=local" if each == "--ray" else each for each in given])
    if arguments.command == "convert":  # its options are the format's own
        arguments.arguments, rest = [*arguments.arguments, *rest], []
    if rest and arguments.command not in ("run", "tune", "keys", "fit", "validate"):
        parser.error(f"unexpected arguments: {' '.join(rest)}")
    with interruptible() as received:
        try:
            _COMMANDS[arguments.command](arguments, rest)
            return 0
        except BaseException as error:
            if received.number is None and not isinstance(error, KeyboardInterrupt):
                return _explain(error)
    number = received.number or signal.SIGINT
    # On a line of its own: a progress bar or half a line of the log may stand there.
    print(f"\ninterrupted by {signal.Signals(number).name}{_GO_ON.get(arguments.command, '')}", file=sys.stderr)
    return 128 + number


def _add_log_commands(commands) -> None:
    """Those about request logs and artefacts."""
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    fit = commands.add_parser(
        "fit", help="train a reranker on a request log", **form,
        epilog="dnr-recbole fit requests.parquet --items=items.parquet --out=my_model --model=PRM\n" + _EPILOG,
    )  # fmt: skip
    fit.add_argument("log", help="requests with candidates, scores and labels; docs/logs.md")
    fit.add_argument("--out", required=True, help="folder of the trained model")
    fit.add_argument("--users", help="table of user features")
    fit.add_argument("--items", help="table of item features")
    fit.add_argument("--start_from", help="folder of an earlier model to go on from")
    rank = commands.add_parser(
        "rank", help="rank the candidates of requests", **form,
        epilog="dnr-recbole rank my_model new_requests.parquet ranked.parquet --k=6\n"
        "dnr-recbole rank my_model requests/ ranked/ --k=6 --ray=head-node:6379",
    )  # fmt: skip
    rank.add_argument("artefact", metavar="MODEL", help="folder that fit or run --artefact_dir wrote")
    rank.add_argument("requests", metavar="IN", help="requests without labels: parquet, feather, CSV or TSV")
    rank.add_argument("output", metavar="OUT", help="parquet or CSV; with --ray a folder of parquet")
    rank.add_argument("--k", type=int, help="candidates per request; default: all")
    _add_ray(rank, "rank a parquet file, or a folder of them, part by part")
    evaluate = commands.add_parser(
        "evaluate", help="metrics of one model or two on a request log", **form,
        epilog="dnr-recbole evaluate my_model newer_requests.parquet --against=other_model",
    )  # fmt: skip
    evaluate.add_argument("artefact", metavar="MODEL")
    evaluate.add_argument("log")
    evaluate.add_argument("--against", help="another model: paired test over users, slices")
    export = commands.add_parser(
        "export", help="write a model's scoring as one file for other runtimes", **form,
        epilog="dnr-recbole export my_model my_model.onnx\ndnr-recbole export my_model small.onnx --quantise=int8",
    )  # fmt: skip
    export.add_argument("artefact", metavar="MODEL", help="folder that fit or run --artefact_dir wrote")
    export.add_argument("output", metavar="OUT", help="the file")
    export.add_argument("--format", choices=["onnx"], default="onnx", help="default: onnx")
    export.add_argument("--quantise", choices=["int8"], help="smaller weights, no longer the same scores")
    validate = commands.add_parser(
        "validate", help="name every problem of a request log", **form,
        epilog="dnr-recbole validate requests.csv\nAny key about logs is an option, e.g. --order_by=bm25. The exit "
        "code is 1 if training would refuse the log.",
    )  # fmt: skip
    validate.add_argument("log")
    convert = commands.add_parser(
        "convert", help="make a request log of another format: mind, letor, trec, recflow, …", **form, add_help=False,
        epilog="dnr-recbole convert mind behaviors.tsv news.tsv mind.parquet",
    )  # fmt: skip
    convert.add_argument("arguments", nargs=argparse.REMAINDER, metavar="FORMAT IN… OUT.parquet")
    add_serve(commands, form)


def _add_ray(command, purpose: str) -> None:
    """The option --ray[=ADDRESS]."""
    command.add_argument(
        "--ray", metavar="ADDRESS", help=f"{purpose} on a Ray cluster, docs/more_than_one_machine.md: host:port, "
        "auto, or without an address on this machine",
    )  # fmt: skip


def _explain(error: BaseException) -> int:
    """Print what is expected to happen as one line and return the exit code; anything else is raised again."""
    if isinstance(error, DnrError):
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, BrokenPipeError):  # e.g. `dnr-recbole keys | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, OSError):
        print(f"error: {error.strerror or error}: {error.filename or ''}", file=sys.stderr)
        return 1
    raise error


def _run(arguments, rest: List[str]) -> None:
    from dnr_recbole.quick_start import run_dnr

    run_dnr(argv=rest)


def _fit(arguments, rest: List[str]) -> None:
    from dnr_recbole.log_commands import fit_command

    fit_command(arguments.log, arguments.out, arguments.users, arguments.items, arguments.start_from, rest)


def _rank(arguments, rest: List[str]) -> None:
    from dnr_recbole.log_commands import rank_command

    rank_command(arguments.artefact, arguments.requests, arguments.output, arguments.k, arguments.ray)


def _evaluate(arguments, rest: List[str]) -> None:
    from dnr_recbole import Reranker

    print(Reranker.load(arguments.artefact).evaluate(arguments.log, arguments.against))


def _export(arguments, rest: List[str]) -> None:
    from dnr_recbole.log_commands import export_command

    export_command(arguments.artefact, arguments.output, arguments.quantise)


def _validate(arguments, rest: List[str]) -> None:
    from dnr_recbole.log_commands import validate_command

    validate_command(arguments.log, rest)


def _convert(arguments, rest: List[str]) -> None:
    from dnr_recbole.convert import convert_command

    print(convert_command(arguments.arguments))


def _serve(arguments, rest: List[str]) -> None:
    from dnr_recbole.serving.command import serve_command

    serve_command(arguments)


def _tune(arguments, rest: List[str]) -> None:
    from dnr_recbole.hyper import tune

    tune(
        argv=rest,
        tool=arguments.tool,
        params_file=arguments.params_file,
        search=arguments.search.split(",") if arguments.search else None,
        algo=arguments.algo,
        max_evals=arguments.max_evals,
        output_file=arguments.output_file,
        cpus_per_trial=arguments.cpus_per_trial,
        gpus_per_trial=arguments.gpus_per_trial,
        ray=arguments.ray,
    )


def _compare(arguments, rest: List[str]) -> None:
    from dnr_recbole.experiment.compare import compare

    compare(arguments.plan, arguments.results, arguments.ray, arguments.cpus_per_run, arguments.gpus_per_run)


def _report(arguments, rest: List[str]) -> None:
    from dnr_recbole.experiment.report import report

    report(arguments.spec, arguments.markdown, arguments.page)


def _table(arguments, rest: List[str]) -> None:
    from dnr_recbole.experiment.table import table

    print(table(arguments.plan, arguments.results))


def _significance(arguments, rest: List[str]) -> None:
    from dnr_recbole.evaluator.per_request import report_files

    metrics = arguments.metrics.split(",") if arguments.metrics else None
    print(report_files(arguments.first, arguments.second, metrics, arguments.over))


def _models(arguments, rest: List[str]) -> None:
    from dnr_recbole.registry import list_models, missing_package

    rows = [("NAME", "KIND", "FAMILY", "PAPER")]
    rows += [(m.name, m.kind, m.family, m.paper + missing_package(m.cls)) for m in list_models()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]))
    print("Every RecBole general recommender is a retriever, too: --retriever=BPR, LightGCN, EASE, ItemKNN, Pop, ...")


def _keys(arguments, rest: List[str]) -> None:
    from dnr_recbole.config import Config
    from dnr_recbole.keys import as_markdown, as_text, describe_keys

    show = as_markdown if arguments.format == "markdown" else as_text
    print(show(describe_keys(Config(argv=rest))))


_COMMANDS = {
    "run": _run,
    "fit": _fit,
    "rank": _rank,
    "evaluate": _evaluate,
    "validate": _validate,
    "convert": _convert,
    "export": _export,
    "serve": _serve,
    "tune": _tune,
    "compare": _compare,
    "report": _report,
    "table": _table,
    "significance": _significance,
    "models": _models,
    "keys": _keys,
}

if __name__ == "__main__":
    sys.exit(main())
