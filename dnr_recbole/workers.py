"""Processes that train together: they end with their parent, and it says which of them died of what.

A worker ends when its parent does, whatever ended that: the kernel is asked for it where it can be (Linux), and a
thread waits for the other end of a pipe to close everywhere. The parent owns the store at which the workers meet, so
there is no port to race for and no file to leave behind.

Torch is imported by functions here: a worker's import of this module must be over at once, see :class:`_Entry`.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta
from multiprocessing import connection, parent_process
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

from dnr_recbole.errors import ConfigError, DnrError

_GRACE = 3.0  # seconds that a worker has to end by itself
_CONSEQUENCES = 1.0  # seconds until the failure of one worker has reached the others
_START = timedelta(minutes=10)  # until all workers have met
_PR_SET_PDEATHSIG = 1


class _Message(NamedTuple):
    """The last word of a worker."""

    kind: str  # result, refused (a DnrError), failed (any other exception)
    content: Any
    time: float  # monotonic, the same clock in all processes


class _Worker(NamedTuple):
    rank: int
    process: Any
    reader: connection.Connection


def run_processes(target: Callable[..., Any], arguments: Sequence[Any], nproc: int, device) -> Any:
    """Call ``target(rank, *arguments)`` in ``nproc`` processes that share a process group; returns what rank 0 does.

    Args:
        target: a function of a module; it and ``arguments`` are pickled, tensors are shared.
        device: a torch.device, cpu or cuda; then each process has a GPU of its own.

    Raises:
        DnrError: as a worker raised it; or a worker died, and the line says which and of what.
    """
    import torch
    import torch.distributed as dist
    import torch.multiprocessing as mp

    backend = "gloo"
    if device.type == "cuda":
        backend = "nccl"
        if torch.cuda.device_count() < nproc:
            raise ConfigError(f"nproc={nproc}: needs as many GPUs, gpu_id names {torch.cuda.device_count()}")
    context = mp.get_context("spawn")
    store = dist.TCPStore("localhost", 0, None, True, timeout=_START, wait_for_workers=False)  # 0: a free port
    workers: List[_Worker] = []
    finished = False
    try:
        for rank in range(nproc):
            reader, writer = context.Pipe(duplex=False)
            given = (rank, nproc, backend, store.port, writer, target, tuple(arguments))
            process = context.Process(target=_Entry(), args=given, daemon=True, name=f"worker {rank}")
            workers.append(_Worker(rank, process, reader))
            with _held_back_signals():
                process.start()
            writer.close()
        result = _wait(workers)
        finished = True
        return result
    finally:
        _stop(workers, finished)
        del store


def _wait(workers: List[_Worker]) -> Any:
    """Until all workers have delivered, or one has failed."""
    messages: Dict[int, _Message] = {}
    while len(messages) < len(workers):
        waiting = [w for w in workers if w.rank not in messages]
        connection.wait([w.reader for w in waiting])  # readable at the end of a process, too
        dead = _receive(waiting, messages)
        if dead or any(m.kind != "result" for m in messages.values()):
            # The cause may arrive after its consequence, which is quick: the others lose their connection.
            deadline = time.monotonic() + _CONSEQUENCES
            while waiting and not dead and time.monotonic() < deadline:
                waiting = [w for w in waiting if w.rank not in messages]
                connection.wait([w.reader for w in waiting], max(0.0, deadline - time.monotonic()))
                dead = _receive(waiting, messages)
            raise _cause(dead, workers, messages)
    return messages[0].content


def _receive(waiting: List[_Worker], messages: Dict[int, _Message]) -> List[_Worker]:
    """Collect what has arrived; returns the workers that ended without a word."""
    dead = []
    for worker in waiting:
        if worker.reader.poll():
            try:
                messages[worker.rank] = worker.reader.recv()
            except (EOFError, OSError):
                dead.append(worker)
    return dead


def _cause(dead: List[_Worker], workers: List[_Worker], messages: Dict[int, _Message]) -> DnrError:
    """What to tell the user. A worker that is gone makes the others fail: it is the cause, else the first word is."""
    if dead:
        worker = dead[0]
        worker.process.join(_GRACE)
        how = _ending(worker.process.exitcode)
    else:
        failures = {rank: m for rank, m in messages.items() if m.kind != "result"}
        rank, message = min(failures.items(), key=lambda item: item[1].time)
        if message.kind == "refused":
            return message.content
        worker = workers[rank]
        summary, details = message.content
        logging.getLogger(__name__).debug(details)
        how = f"failed with {summary}"
    return DnrError(
        f"worker {worker.rank} of {len(workers)} (process {worker.process.pid}) {how}; "
        "the others were stopped; run again with --resume to go on from the last finished epoch"
    )


def _ending(code: Optional[int]) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            return f"was killed by {name}" + (" (the system does so when memory runs out)" if name == "SIGKILL" else "")
    return f"ended without a result, exit code {code}"


def _stop(workers: List[_Worker], finished: bool) -> None:
    """End all workers within a few seconds; those that have finished do so by themselves."""
    started = [w.process for w in workers if w.process.pid is not None]
    for ask in ("wait", "terminate", "kill"):
        if ask == "wait" and not finished:
            continue
        deadline = time.monotonic() + _GRACE
        for process in started:
            if ask != "wait":
                getattr(process, ask)()
        for process in started:
            process.join(max(0.0, deadline - time.monotonic()))


@contextlib.contextmanager
def _held_back_signals():
    """A child begins with the interrupts of a terminal blocked, for good: they are the parent's, who ends it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---------------------------------------------------------------------- in a worker


class _Stopped(BaseException):
    """The parent wants an end; what is being written is cleaned up on the way."""


class _Entry:
    """What a worker calls. It is unpickled before the arguments, whose import of torch takes seconds: a worker that
    has lost its parent must not go on for so long."""

    def __reduce__(self):
        return _begin, (os.getpid(),)  # while the parent pickles it

    def __call__(self, *arguments) -> None:
        _enter(*arguments)


def _begin(parent: int) -> _Entry:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # gone before that call
            os._exit(1)
    return _Entry()


def _enter(rank: int, nproc: int, backend: str, port: int, writer, target, arguments) -> None:
    code = 1
    try:
        parent = parent_process()
        assert parent is not None  # this process is started as a worker
        threading.Thread(target=_watch, args=(parent.sentinel,), daemon=True).start()
        signal.signal(signal.SIGTERM, _terminated)
        message = _outcome(rank, nproc, backend, port, target, arguments)
        writer.send(message)
        code = 0 if message.kind == "result" else 1
    finally:
        with contextlib.suppress(Exception):
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # threads of the process group may abort an orderly exit; and no traceback


def _outcome(rank: int, nproc: int, backend: str, port: int, target, arguments) -> _Message:
    try:
        result = _work(rank, nproc, backend, port, target, arguments)
        return _Message("result", result if rank == 0 else None, time.monotonic())
    except DnrError as error:
        return _Message("refused", error, time.monotonic())
    except _Stopped:
        raise
    except BaseException as error:
        words = str(error).strip().splitlines() or [""]
        summary = f"{type(error).__name__}: {words[0][:300]}"
        return _Message("failed", (summary, traceback.format_exc()), time.monotonic())


def _work(rank: int, nproc: int, backend: str, port: int, target, arguments) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(max(1, torch.get_num_threads() // nproc))
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = dist.TCPStore("localhost", port, None, False, timeout=_START)
    dist.init_process_group(backend, store=store, rank=rank, world_size=nproc)
    result = target(rank, *arguments)
    dist.barrier()  # nobody leaves while another still needs it
    return result


def _terminated(number, frame) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise _Stopped


def _watch(parent) -> None:
    """End with the parent, on every system."""
    connection.wait([parent])
    os._exit(1)
