"""Ray, where there is any: connect to a cluster, call functions in its processes, and say what went wrong in one line.

Ray is imported by functions here. It keeps Python 3.11 or older to itself (RecBole's bound on its version), and a
process that never asks for it does not pay for its import.
"""

from __future__ import annotations

import contextlib
import os
import pkgutil
import socket
import warnings
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

from dnr_recbole import compat
from dnr_recbole.errors import ConfigError, DnrError
from dnr_recbole.signals import kept_handlers
from dnr_recbole.threads import be_a_good_neighbour

LOCAL = "local"  # a cluster of this machine alone, for the length of the command
REMEDY = "pip install 'ray[tune]<=2.6.3' on Python 3.11 or older"
_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"  # what `ray health-check` asks a head node
_ANSWER = 10.0  # seconds within which a head node must answer
_OBJECTS = 256 << 20  # bytes that a local cluster may keep in shared memory; what is passed here is small
_RETRIES = 3  # of a call whose process died
_STOPPING = 10.0  # seconds that calls have to clean up after they were cancelled


@contextlib.contextmanager
def connected(address: str, purpose: str) -> Iterator[None]:
    """Be connected to a cluster during the block; one that this process is connected to already is used as it is.

    Args:
        address: host:port of the head node, ray://host:port of a Ray client server, "auto" for the cluster that this
            machine belongs to, or :data:`LOCAL`, which is RAY_ADDRESS where that is set.
        purpose: what needs Ray, for messages.

    Raises:
        ConfigError: Ray is not installed, nothing that can be used answers at the address, or it has no CPU.
    """
    with warnings.catch_warnings(), kept_handlers():
        warnings.simplefilter("ignore")  # Ray's own, about pkg_resources
        compat.require("ray", purpose, REMEDY)
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or LOCAL if address == LOCAL else address
    _must_answer(address)
    own: Dict[str, Any] = {"object_store_memory": _OBJECTS} if address == LOCAL else {}
    try:
        with kept_handlers():
            ray.init(address, include_dashboard=False, log_to_driver=False, configure_logging=False, **own)
    except Exception as error:
        raise _unusable(address, _first_line(error)) from error
    try:
        if n_cpus() < 1:
            raise _unusable(address, "the cluster has no CPU to give")
        yield
    finally:
        ray.shutdown()


def _must_answer(address: str) -> None:
    """Ray itself would try for minutes, print dozens of lines, and not name the address that was given."""
    place = address.partition("://")[2] if address.startswith("ray://") else address
    if place in (LOCAL, "auto"):
        return
    host, _, port = place.rpartition(":")
    if not host or not port.isdigit():
        raise _unusable(address, "must be host:port, ray://host:port or auto")
    import grpc

    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()
        with grpc.insecure_channel(place, options=(("grpc.enable_http_proxy", 0),)) as channel:
            channel.unary_unary(_ALIVE)(b"", timeout=_ANSWER)
    except (OSError, OverflowError) as error:
        raise _unusable(address, getattr(error, "strerror", None) or _first_line(error)) from error
    except grpc.RpcError as error:
        # A client server answers, but not to what a head node is asked.
        if place == address or error.code() != grpc.StatusCode.UNIMPLEMENTED:
            wanted = "head node" if place == address else "client server"
            raise _unusable(address, f"what answers is no {wanted}") from error


def _unusable(address: str, reason: str) -> ConfigError:
    return ConfigError(f"--ray={address}: no Ray cluster to use there: {reason}; ask `ray status` on its head node")


def n_cpus() -> int:
    """CPUs of the cluster that this process is connected to."""
    import ray

    return int(ray.cluster_resources().get("CPU", 0))


def check_shares(what: str, cpus: float, gpus: float, on_cluster: bool) -> None:
    """What a run or trial takes of a cluster, ``--cpus_per_<what>`` and ``--gpus_per_<what>``.

    Raises:
        ConfigError: no cluster gives that: Ray would say so in a traceback, or wait for it without an end.
    """
    for name, value, least in ((f"cpus_per_{what}", cpus, 0.01), (f"gpus_per_{what}", gpus, 0.0)):
        if not least <= value < 1e6 or (value > 1 and value % 1):
            raise ConfigError(f"--{name}={value:g}: must be a whole number, or a share of at least {least:g} of one")
    if not on_cluster and (cpus, gpus) != (1.0, 0.0):
        raise ConfigError(f"--cpus_per_{what} and --gpus_per_{what} mean something on a Ray cluster only")


def must_have(what: str, cpus: float, gpus: float) -> None:
    """Raises:
    ConfigError: the cluster that this process is connected to has less than one run or trial takes.
    """
    import ray

    found = ray.cluster_resources()
    for name, kind, value in ((f"cpus_per_{what}", "CPU", cpus), (f"gpus_per_{what}", "GPU", gpus)):
        if value > found.get(kind, 0):
            raise ConfigError(f"--{name}={value:g}: the cluster has {found.get(kind, 0):g} {kind}s")


def device_keys() -> Dict[str, str]:
    """In a call to which the cluster has given GPUs: the key that makes a run use these and no others."""
    import ray

    gpus = ray.get_gpu_ids()
    return {"gpu_id": ",".join(map(str, gpus))} if gpus else {}


class Calls:
    """Calls of a function in processes of the cluster, each under a name; what is left is cancelled at the end.

    If the process of a call dies, or its machine, Ray makes the call again elsewhere: it must be one that may be made
    twice.

    Args:
        function: of a module, since its name travels and not its code; its arguments and results are pickled.
        cpus, gpus: that a call takes.
    """

    def __init__(self, function: Callable[..., Any], cpus: float = 1.0, gpus: float = 0.0):
        import ray

        self._what = f"{function.__module__}:{function.__qualname__}"
        self._call = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=_RETRIES)(_answer)
        self._names: Dict[Any, Any] = {}

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: Any) -> None:
        import ray

        for reference in self._names:
            ray.cancel(reference)
        if self._names:
            ray.wait(list(self._names), num_returns=len(self._names), timeout=_STOPPING)
        self._names.clear()

    def __len__(self) -> int:
        return len(self._names)

    def submit(self, name: Any, *arguments: Any) -> None:
        """Have the function called with these arguments."""
        self._names[self._call.remote(self._what, os.getcwd(), arguments)] = name

    def next(self, timeout: Optional[float] = None) -> Optional[Tuple[Any, Any]]:
        """Name and result of a call that has ended, or the DnrError that says why it has none; waits for one.

        Args:
            timeout: seconds after which None is returned instead.
        """
        import ray

        found, _ = ray.wait(list(self._names), num_returns=1, timeout=timeout)
        if not found:
            return None
        name = self._names.pop(found[0])
        try:
            return name, ray.get(found[0])
        except ray.exceptions.RayError as error:
            return name, DnrError(f"{_died(error)}; the same command goes on with what is missing")


def _died(error: Exception) -> str:
    """Why Ray has no result."""
    import ray

    lost = (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)
    if isinstance(error, lost):
        return f"its process died {1 + _RETRIES} times ({type(error).__name__}: it needs more memory than there is?)"
    return f"a process of the cluster failed with {_first_line(getattr(error, 'cause', None) or error)}"


def _answer(what: str, folder: str, arguments: Tuple[Any, ...]) -> Any:
    """In a process of the cluster: the result, or the error as a value."""
    be_a_good_neighbour()  # before the function's module imports torch
    try:
        try:
            os.chdir(folder)
        except OSError as error:
            raise DnrError(
                f"the machine {socket.gethostname()} has no folder {folder}, where the command was given: start it in "
                f"one that all machines share ({error.strerror})"
            ) from error
        return pkgutil.resolve_name(what)(*arguments)
    except DnrError as error:
        return error
    except Exception as error:
        return DnrError(f"on {socket.gethostname()}: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    """An error of somebody else's in a few words."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
