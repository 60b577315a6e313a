"""The command's side of ranking part by part: what is there, what is missing, who makes it.

In the output folder stand ``part-<number>-<identity>.parquet``, in the order of the input, and when all are there
``_manifest.json``; readers of parquet folders skip names that begin with ``_``. The identity of a part is known before
it is made, so a part that stands there is not made again, and one of other rows, of another model or other options is
removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

from tqdm import tqdm

from dnr_recbole._version import __version__
from dnr_recbole.artefact import artefact_digest
from dnr_recbole.cluster import Calls, connected, n_cpus
from dnr_recbole.errors import DataError, DnrError
from dnr_recbole.files import sweep, write_json
from dnr_recbole.locks import hold
from dnr_recbole.parts.inputs import Inputs, Part, Segment, find_inputs, parts_of
from dnr_recbole.parts.work import Counts, Job, counts_of, look_at, rank_part

MANIFEST = "_manifest.json"
_LOCK = ".rank.lock"
_NAME = re.compile(r"part-[0-9]{6,}-(?P<identity>[0-9a-f]{16})\.parquet")
_AHEAD = 4  # calls for each CPU that are handed over before they can begin, so that none waits for the next
_FEWEST = 64


def rank_parts(artefact: str, requests: str, output: str, k: Optional[int], address: str) -> str:
    """Rank a parquet file, or all of a folder, into the folder ``output``; what stands there already is kept.

    Returns:
        what was done, in one line.

    Raises:
        DnrError: the model, the requests, the folder or the cluster cannot be used; parts that were made are kept.
    """
    started, model, inputs = time.time(), artefact_digest(artefact), find_inputs(requests)
    output = os.path.abspath(output)
    if os.path.isdir(requests) and os.path.commonpath([inputs.root, output]) == inputs.root:
        raise DataError(
            f"'{output}' lies in the folder that is read: what is written there would be read the next time"
        )
    job = Job(inputs.root, os.path.abspath(artefact), model, k, output)
    with _alone(output), connected(address, "rank --ray"):
        wanted = _names(job, _parts(job, inputs))
        counts = _tidy(job, wanted)
        kept = len(counts)
        missing = {name: part for name, part in wanted.items() if name not in counts}
        rows = sum(part.rows for part in wanted.values())
        with _bar(rows, rows - sum(part.rows for part in missing.values())) as bar:
            for name, found in _calls(rank_part, [(name, (job, part, name), part) for name, part in missing.items()]):
                counts[name] = found
                bar.update(missing[name].rows)
        total = Counts(*(sum(column) for column in zip(*counts.values())))
        if total.rows != sum(file.rows for file in inputs.files):
            raise DataError(f"'{requests}': {total.rows:,} rows were ranked, the files say otherwise: did one change?")
        _must_be_complete(job, wanted)
        _write_manifest(job, inputs, wanted, counts, total)
    done = f"{total.requests:,} requests, {total.ranked:,} rows -> {output} in {time.time() - started:.1f} s"
    return f"{done} ({len(wanted)} parts" + (f", {kept} of them were there)" if kept else ")")


def _parts(job: Job, inputs: Inputs) -> List[Part]:
    """The parts; at least one, so that the columns are there even if no request is."""
    runs: Dict[int, Any] = {}
    if not inputs.list_form:
        blocks = [Part([block]) for block in inputs.blocks]
        runs.update(_calls(look_at, [(number, (job, block), block) for number, block in enumerate(blocks)]))
    parts = parts_of(inputs, [runs[number] for number in sorted(runs)])
    return parts or [Part([Segment(inputs.files[0], 0, 0)])]


def _names(job: Job, parts: Sequence[Part]) -> Dict[str, Part]:
    return {f"part-{number:06}-{part.identity(job.made_with)}.parquet": part for number, part in enumerate(parts)}


def _calls(function: Callable[..., Any], tasks: Sequence[Tuple[Any, tuple, Any]]) -> Iterator[Tuple[Any, Any]]:
    """Names and results in the order in which they come.

    Args:
        tasks: name, arguments, and what it is about.

    Raises:
        DnrError: of the first that fails; what has not begun is left alone.
    """
    about = {name: what for name, _, what in tasks}
    waiting, ahead = iter(tasks), max(_FEWEST, _AHEAD * n_cpus())
    with Calls(function) as calls:
        while True:
            for name, arguments, _ in waiting:
                calls.submit(name, *arguments)
                if len(calls) >= ahead:
                    break
            if not len(calls):
                return
            done = calls.next()
            assert done is not None  # it waits without an end
            name, result = done
            if isinstance(result, DnrError):
                raise type(result)(f"{about[name]}: {result}") from result
            yield name, result


# ---------------------------------------------------------------------- the folder


@contextlib.contextmanager
def _alone(output: str) -> Iterator[None]:
    """Have the output folder for oneself.

    Raises:
        DataError: another process ranks into it, or somebody else's files stand there.
    """
    os.makedirs(output, exist_ok=True)
    others = [name for name in os.listdir(output) if not name.startswith((".", "_")) and not _NAME.fullmatch(name)]
    if others:
        raise DataError(f"'{output}' holds '{min(others)}', which no `rank --ray` has written: choose another folder")
    with hold(os.path.join(output, _LOCK), wait=False, remove=True) as held:
        if not held:
            raise DataError(f"another process ranks into '{output}': wait for it, or choose another folder")
        sweep(output)
        yield


def _tidy(job: Job, wanted: Dict[str, Part]) -> Dict[str, Counts]:
    """Remove parts that are not wanted, rename those whose place has changed, and count those that are there."""
    by_identity = {found["identity"]: name for name in wanted if (found := _NAME.fullmatch(name))}
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(job.output, MANIFEST))  # while parts are missing nothing may call the folder complete
    counts, stale = {}, 0
    for found in filter(None, map(_NAME.fullmatch, sorted(os.listdir(job.output)))):
        path, identity = os.path.join(job.output, found.string), found["identity"]
        there, name = counts_of(path, identity), by_identity.get(identity)
        if name is None or there is None or (name in counts and name != found.string):  # there twice: one is enough
            os.unlink(path)
            stale += 1
        else:
            os.replace(path, os.path.join(job.output, name))
            counts[name] = there
    if stale:
        print(
            f"{job.output}: {stale} parts were removed: of other requests, another model or other options, or damaged",
            flush=True,
        )
    return counts


def _must_be_complete(job: Job, wanted: Dict[str, Part]) -> None:
    """What readers of the folder will find is what is wanted, once; a process of a command that was killed may have
    finished a part under the name that this one had then.

    Raises:
        DataError: a part is not there any more.
    """
    there = {found.string for found in filter(None, map(_NAME.fullmatch, os.listdir(job.output)))}
    for name in there.difference(wanted):
        os.unlink(os.path.join(job.output, name))
    lost = [name for name in wanted if name not in there]
    if lost:
        raise DataError(f"'{job.output}': {len(lost)} parts are gone, the first is {lost[0]}: give the command again")


def _write_manifest(
    job: Job, inputs: Inputs, wanted: Dict[str, Part], counts: Dict[str, Counts], total: Counts
) -> None:
    content = {
        "format": 1,
        "written_by": __version__,
        "model": {"path": job.artefact, "sha256": job.model},
        "options": {"k": job.k},
        "folder": inputs.root,
        "inputs": [file._asdict() for file in inputs.files],
        "total": total._asdict(),
        "parts": [
            {"file": name, **counts[name]._asdict(),
             "from": [{"file": file.name, "start": start, "stop": stop} for file, start, stop in part.segments]}
            for name, part in wanted.items()
        ],
    }  # fmt: skip
    write_json(os.path.join(job.output, MANIFEST), content, "the manifest")


def _bar(total: int, there: int) -> tqdm:
    return tqdm(unit=" rows", ncols=100, leave=False, total=total, initial=there, disable=None)
