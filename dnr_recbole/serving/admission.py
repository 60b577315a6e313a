"""Whether one more body is taken: by how long what is in work before it will take."""

from __future__ import annotations

from typing import NamedTuple, Optional

_GUESS = 5e-7  # seconds per byte until answers have shown it: about a millisecond for 50 candidates
_WEIGHT = 0.1  # of an answer in the running mean


class Place(NamedTuple):
    """A body in work: its size and the size of all that were in work when it came, in bytes."""

    size: int
    ahead: int


class Admission:
    """Takes a body if what is in work ahead of it will be done within ``budget`` seconds.

    Work is measured in bytes of bodies, since a body is weighed before it is read, and ends with the answer, so that
    all counts that makes a client wait: reading, the queue, the model, writing. How long a byte takes is the mean over
    recent answers that had others ahead of them. One that had not is slower than that, as scoring together saves time,
    and says only that it takes no longer. A body that finds nothing in work is always taken.
    """

    def __init__(self, budget: float):
        self.budget = budget
        self._work = 0  # bytes
        self._seconds = _GUESS  # per byte

    @property
    def wait(self) -> float:
        """Seconds that a body would wait if it came now."""
        return self._work * self._seconds

    def enter(self, size: int) -> Optional[Place]:
        """The place of a body of ``size`` bytes; None = it is not taken."""
        if self._work and self.wait > self.budget:
            return None
        place = Place(max(size, 1), self._work)
        self._work += place.size
        return place

    def leave(self, place: Place, seconds: Optional[float]) -> None:
        """A body is done, ``seconds`` after it was taken; None = it was not answered and tells nothing."""
        self._work -= place.size
        if seconds is None:
            return
        per_byte = seconds / (place.ahead + place.size)
        if place.ahead or per_byte < self._seconds:
            self._seconds += _WEIGHT * (per_byte - self._seconds)
