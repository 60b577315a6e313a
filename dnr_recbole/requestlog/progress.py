"""Progress over batches of requests: rate and time left."""

from __future__ import annotations

from typing import Iterator, Optional, Sized, TypeVar

from tqdm import tqdm

Countable = TypeVar("Countable", bound=Sized)


def watched(batches: Iterator[Countable], total: Optional[int], title: str, show: bool) -> Iterator[Countable]:
    """The batches, with a bar on stderr that counts their requests; ``total`` None = no time left is shown."""
    if not show:
        yield from batches
        return
    with tqdm(total=total, desc=title, unit=" requests", ncols=100, leave=False) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))
