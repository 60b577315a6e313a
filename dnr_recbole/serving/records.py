"""Answers and what users did with them, on disk, as the next training's log.

A folder of JSON lines, ``answers.jsonl`` and ``feedback.jsonl``, that are appended to; a message of /feedback is
acknowledged when it is on the disk (fsync, one for all that wait). A line that a full disk or a kill has cut stays, and
the next one stands by itself. `dnr-recbole convert served FOLDER OUT.parquet` counts it, leaves it out, and joins the
others by request_id into the canonical log.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO, Dict, List, Optional, Tuple

from dnr_recbole.errors import DataError

ANSWERS, FEEDBACK = "answers.jsonl", "feedback.jsonl"
_MOST = 10_000  # answers that may wait to be written; more are counted and dropped


class Records:
    """Appends to the folder in one thread.

    Raises:
        DataError: the folder cannot be written.
    """

    def __init__(self, folder: str):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._files = {name: open(Path(folder) / name, "ab", buffering=0) for name in (ANSWERS, FEEDBACK)}
        except OSError as error:
            raise DataError(f"--record={folder}: {error.strerror or error}") from error
        self._cut = set(self._files)  # that may end within a line: a process that was killed may have left them so
        self.dropped = 0  # answers that were not written
        self._queue: queue.Queue = queue.Queue(_MOST)
        self._thread = threading.Thread(target=self._write, name="records", daemon=True)
        self._thread.start()

    def answer(self, content: Dict[str, Any]) -> None:
        """Keep an answer; does not wait."""
        try:
            self._queue.put_nowait((ANSWERS, {**content, "time": time.time()}, None))
        except queue.Full:
            self.dropped += 1

    async def feedback(self, content: Dict[str, Any]) -> None:
        """Keep a message and return when it is on the disk.

        Raises:
            OSError: it cannot be written.
        """
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        message = (FEEDBACK, {**content, "time": time.time()}, (loop, done))
        await loop.run_in_executor(None, self._queue.put, message)
        await done

    def close(self) -> None:
        """Write what waits."""
        self._queue.put(None)
        self._thread.join()
        for file in self._files.values():
            file.close()

    def _write(self) -> None:
        ending = False
        while not ending:
            batch = [self._queue.get()]
            while len(batch) < 1000:
                try:
                    batch.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            ending = None in batch
            failed = self._append([message for message in batch if message is not None])
            for message in batch:
                if message is not None and message[2] is not None:
                    loop, future = message[2]
                    loop.call_soon_threadsafe(_settle, future, failed.get(message[0]))

    def _append(self, messages: List[Tuple[str, dict, Any]]) -> Dict[str, OSError]:
        """Write messages; -> the files whose messages may not be on the disk, and why."""
        failed = {}
        for name in self._files:
            lines = [json.dumps(content, separators=(",", ":")) + "\n" for to, content, _ in messages if to == name]
            if not lines:
                continue
            try:
                self._write_lines(name, "".join(lines).encode())
            except OSError as error:  # a full disk: say so to those who wait, and try again with the next
                failed[name] = error
                if name == ANSWERS:
                    self.dropped += len(lines)
        return failed

    def _write_lines(self, name: str, content: bytes) -> None:
        file = self._files[name]
        if name in self._cut:
            _end_line(file)
        self._cut.add(name)
        while content:  # a write may take a part: the rest shows why
            content = content[file.write(content) :]
        self._cut.discard(name)
        os.fsync(file.fileno())


def _settle(future: asyncio.Future, error: Optional[OSError]) -> None:
    if not future.done():
        future.set_result(None) if error is None else future.set_exception(error)


def _end_line(file: BinaryIO) -> None:
    """End a line that was cut, so that the next one stands by itself."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        return
    with open(file.name, "rb") as reading:
        reading.seek(size - 1)
        if reading.read(1) != b"\n":
            file.write(b"\n")
