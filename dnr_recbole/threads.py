"""How the threads of this process behave beside other processes; to be decided before torch is imported.

Idle OpenMP threads spin for the next piece of work. Two trainings on the same cores then take the cores from each other
and run many times slower. Threads that sleep at once must be woken for every operation, which costs a training that is
alone up to a fifth; so they spin for a few microseconds, about as long as the gaps within a step, and sleep then
(docs/speed.md). Entry points call :func:`be_a_good_neighbour`, and the processes that they start inherit what it sets.
What the user has set goes first.
"""

from __future__ import annotations

import contextlib
import math
import os
from typing import MutableMapping, Optional

_CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # any of them is a decision of the user's
_SPINS = "1000"  # of GNU's runtime, which PyTorch's wheels bring
_QUOTA = "/sys/fs/cgroup/cpu.max"  # "<quota> <period>" in microseconds, or "max <period>"
_QUOTA_V1 = ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us")


def _quota() -> Optional[float]:
    """Cores' worth of time that the control group (version 2 or 1) allows; None = no limit, or not to be read."""
    with contextlib.suppress(OSError, ValueError):
        with open(_QUOTA, encoding="ascii") as file:
            quota, period = file.read().split()
        return None if quota == "max" else float(quota) / float(period)
    with contextlib.suppress(OSError, ValueError):
        values = []
        for path in _QUOTA_V1:
            with open(path, encoding="ascii") as file:
                values.append(float(file.read()))
        return None if values[0] <= 0 else values[0] / values[1]
    return None


def be_a_good_neighbour(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let idle threads soon sleep, and start no more threads than the control group gives this process cores.

    Without effect on a torch that is imported already. (The affinity of the process OpenMP heeds itself.)
    """
    if not any(name in environment for name in _CHOSEN):
        environment.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT=_SPINS)
    quota, cores = _quota(), os.cpu_count() or 1
    if quota is not None and quota < cores:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, math.ceil(quota))))
