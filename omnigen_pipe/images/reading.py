"""Which candidates the `files` log knows, and the reading of the rest.

A file whose size and modification time the log has seen is not opened. What could not be read
(permissions, a torn network) is no fact about its bytes: it is not logged, and tried again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import pyarrow as pa

from manifests.log import Log
from manifests.query import Source, fingerprint, query
from manifests.views import current_files
from omnigen_pipe.images.candidates import Candidate
from omnigen_pipe.images.probe import Facts, Reading, read_files
from omnigen_pipe.mtimes import RACY_NS

#: A candidate and the dataset that it was found for.
Entry = tuple[str, Candidate]


def known_readings(entries: Sequence[Entry], files: pa.Table | Source) -> list[Reading | None]:
    """For each entry what the `files` log says of it; None where nothing, or too little.

    None, too, for a candidate with a reason: it is not to be opened at all.
    """
    usable = [(i, d, c) for i, (d, c) in enumerate(entries) if c.reason is None]
    found = pa.table(
        {
            "entry": pa.array([i for i, _, _ in usable], pa.int64()),
            "dataset": pa.array([d for _, d, _ in usable], pa.string()),
            "path": pa.array([c.path for _, _, c in usable], pa.string()),
            "size": pa.array([c.size for _, _, c in usable], pa.int64()),
            "mtime_ns": pa.array([c.mtime_ns for _, _, c in usable], pa.int64()),
        }
    )
    rows = query(
        """
        SELECT entry, read_at_ns, content_hash, format, width, height, mode, frames, reason
        FROM found JOIN files USING (dataset, path, size, mtime_ns)
        WHERE abs(read_at_ns - mtime_ns) >= ?
        """,
        RACY_NS,
        found=found,
        files=current_files(files),
    )
    readings: list[Reading | None] = [None] * len(entries)
    columns = [column.to_pylist() for column in rows.columns]
    for entry, read_at_ns, *facts in zip(*columns, strict=True):
        readings[entry] = Reading(read_at_ns, Facts(*facts))
    return readings


def read_missing(
    entries: Sequence[Entry],
    readings: list[Reading | None],
    log: Log,
    advance: Callable[[int], None],
    flush_seconds: float,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> tuple[int, int]:
    """Read the files of the entries without a reading, fill these in, and log the facts.

    A file that several entries name is opened once, and not at all where another entry's
    reading is of the same state. New rows are published every `flush_seconds`, and at the end,
    also where that is an exception; a process killed outright loses the rows since the last
    time. Once `asked_to_stop` is true no further file is begun, and those begun are finished.
    Returns how many files were opened, and how many rows were logged.
    """
    missing: dict[_State, list[int]] = {}
    for number, ((_, candidate), reading) in enumerate(zip(entries, readings, strict=True)):
        if reading is None and candidate.reason is None:
            missing.setdefault(_state(candidate), []).append(number)
    rows: list[dict[str, object]] = []
    opened = logged = 0

    def wanted() -> Iterator[_State]:
        for state in missing:
            if asked_to_stop():
                return
            yield state

    def fill_in(numbers: list[int], reading: Reading) -> None:
        for number in numbers:
            readings[number] = reading
            if reading.facts is not None:
                rows.append(_row(entries[number], reading.read_at_ns, reading.facts))
        advance(len(numbers))

    def publish() -> None:
        nonlocal logged
        if rows:
            table = pa.Table.from_pylist(rows, log.manifest.schema)
            log.append(table, fingerprint=fingerprint(table, list(log.manifest.key)))
        logged += len(rows)
        rows.clear()

    try:
        if missing:
            for (_, candidate), reading in list(zip(entries, readings, strict=True)):
                if reading is not None and (same := missing.pop(_state(candidate), None)):
                    fill_in(same, reading)
        published = time.monotonic()
        # Closed at once when anything fails, so that no thread reads on for nobody.
        with closing(read_files(wanted())) as fresh:
            # Fewer readings than were missing where it was asked to stop.
            for numbers, reading in zip(missing.values(), fresh, strict=False):
                opened += 1
                fill_in(numbers, reading)
                if time.monotonic() - published >= flush_seconds:
                    publish()
                    published = time.monotonic()
    finally:
        publish()
    return opened, logged


#: A file as it was at one time: where it lies, its size and its modification time.
_State = tuple[str, int, int]


def _state(candidate: Candidate) -> _State:
    assert candidate.size is not None  # only None beside a reason
    assert candidate.mtime_ns is not None
    return candidate.real, candidate.size, candidate.mtime_ns


def _row(entry: Entry, read_at_ns: int, facts: Facts) -> dict[str, object]:
    dataset, candidate = entry
    return {
        "dataset": dataset,
        "path": candidate.path,
        "size": candidate.size,
        "mtime_ns": candidate.mtime_ns,
        "read_at_ns": read_at_ns,
        "content_hash": facts.content_hash,
        "format": facts.format,
        "width": facts.width,
        "height": facts.height,
        "mode": facts.mode,
        "frames": facts.frames,
        "status": "ok" if facts.reason is None else "rejected",
        "reason": facts.reason,
    }
