"""``dnr-recbole serve``."""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
from typing import Any, Dict, List, Optional

from dnr_recbole.errors import ConfigError

_TOKEN = "DNR_RECBOLE_TOKEN"


def serve_command(arguments: Any) -> None:
    """Load, warm up, answer until a signal; what is being answered then is finished first.

    Raises:
        ConfigError: an option cannot be used. CheckpointError: an artefact cannot be loaded.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ConfigError(f"serve needs {error.name}: pip install 'dnr_recbole[serve]'") from None
    from dnr_recbole.serving.app import make_app
    from dnr_recbole.serving.batching import Batcher
    from dnr_recbole.serving.models import Models, named_paths
    from dnr_recbole.serving.records import Records
    from dnr_recbole.serving.server import Limits, Server

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s", force=True)
    logging.getLogger("dnr_recbole.serving.access").setLevel(logging.INFO if arguments.access_log else logging.WARNING)
    check_limits(arguments)
    models = Models(named_paths(arguments.models), shares(arguments.split), arguments.runtime)
    records = Records(arguments.record) if arguments.record else None
    limits = Limits(
        body=arguments.max_body, requests=arguments.max_requests, candidates=arguments.max_candidates,
        seconds=arguments.timeout, wait=arguments.max_wait / 1000,
    )  # fmt: skip
    batcher = Batcher(models, arguments.max_batch)
    server = Server(models, batcher, limits, token(arguments.token_file), records, arguments.watch)
    config = uvicorn.Config(
        make_app(server), http="h11",  # httptools, a fifth faster, takes headers without end
        access_log=False, log_level="warning", server_header=False, timeout_keep_alive=30,
        timeout_graceful_shutdown=int(limits.seconds) + 1,
    )  # fmt: skip
    gc.collect()
    gc.freeze()  # a full collection would walk all of torch and stop every answer for a fifth of a second
    with listening(arguments.host, arguments.port) as listener:
        host, port = listener.getsockname()[:2]
        print(f"serving {', '.join(models.names)} on http://{host}:{port}", file=sys.stderr, flush=True)
        uvicorn.Server(config).run([listener])


def check_limits(arguments: Any) -> None:
    """Raises:
    ConfigError: a number lies outside what a server can keep.
    """
    from dnr_recbole.serving.schema import MOST_CANDIDATES, MOST_REQUESTS

    ranges = {
        "max_body": (1, 2**30), "max_requests": (1, MOST_REQUESTS), "max_candidates": (1, MOST_CANDIDATES),
        "max_batch": (1, MOST_REQUESTS), "max_wait": (0, 3.6e6), "timeout": (0.001, 3600), "watch": (0, 3.15e7),
    }  # fmt: skip
    for name, (least, most) in ranges.items():
        value = getattr(arguments, name)
        if not least <= value <= most:
            raise ConfigError(f"--{name}={value}: must lie in [{least}, {most:g}]")


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens: clients that connect from now on are answered as soon as the server runs.

    Raises:
        ConfigError: something else listens there, or there is no such address.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=1024)
        # asyncio does so only for sockets that name their protocol. Otherwise the second part of an answer waits for
        # the acknowledgement of the first, 40 ms with most clients. What is accepted inherits it.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}") from None


def token(path: Optional[str]) -> Optional[str]:
    """The bearer token of a file, or of the environment.

    Raises:
        ConfigError: the file cannot be read, or it or the variable is empty.
    """
    if path is None:
        given = os.environ.get(_TOKEN)
        if given is not None and not given.strip():  # an unset variable of whoever starts it: not "anybody may ask"
            raise ConfigError(f"${_TOKEN} is set and empty: give it a token, or unset it if anybody may ask")
        return None if given is None else given.strip()
    try:
        with open(path, encoding="utf-8") as file:
            found = file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token_file={path}: {getattr(error, 'strerror', None) or error}") from None
    if not found:
        raise ConfigError(f"--token_file={path}: is empty")
    return found


def shares(arguments: List[str]) -> Dict[str, float]:
    """``NAME=SHARE`` of the traffic.

    Raises:
        ConfigError: the share is no number.
    """
    out = {}
    for argument in arguments:
        name, _, share = argument.partition("=")
        try:
            out[name] = float(share)
        except ValueError:
            raise ConfigError(f"--split={argument}: must be NAME=SHARE, e.g. new=0.1") from None
    return out


def add_serve(commands: Any, form: dict) -> None:
    """The command's options."""
    serve = commands.add_parser(
        "serve", help="rank over HTTP", **form,
        epilog="dnr-recbole serve my_model\ndnr-recbole serve old=model_1 new=model_2 --split=new=0.1",
    )  # fmt: skip
    serve.add_argument("models", nargs="+", metavar="[NAME=]MODEL", help="folders that fit or run --artefact_dir wrote")
    serve.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    serve.add_argument("--port", type=int, default=8000, help="default: 8000; 0 = any free one")
    serve.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME=SHARE",
        help="share of users, the rest is the first model's",
    )
    serve.add_argument(
        "--runtime", choices=["torch", "onnx"], default="torch", help="what scores (default: torch; docs/export.md)"
    )
    serve.add_argument("--token_file", help=f"file with the bearer token; else ${_TOKEN}; else anybody may ask")
    serve.add_argument("--record", metavar="FOLDER", help="keep answers and feedback for the next training")
    serve.add_argument("--max_body", type=int, default=4 * 2**20, help="bytes of a body (default: 4 MiB)")
    serve.add_argument("--max_requests", type=int, default=256, help="requests of a body (default: 256)")
    serve.add_argument("--max_candidates", type=int, default=2000, help="candidates of a request (default: 2000)")
    serve.add_argument("--max_batch", type=int, default=32, help="requests scored together (default: 32)")
    serve.add_argument(
        "--max_wait", type=float, default=50, help="ms behind others from which on requests are refused (default: 50)"
    )
    serve.add_argument("--timeout", type=float, default=5.0, help="seconds until an answer (default: 5)")
    serve.add_argument(
        "--watch", type=float, default=1.0, help="seconds between looks for a newer model, 0 = never (default: 1)"
    )
    serve.add_argument("--access_log", action="store_true", help="a line of JSON for each answer on stderr")
