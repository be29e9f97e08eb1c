"""Which candidates the `files` log knows, and the reading of the rest.

A file whose size and modification time the log has seen is not opened. What could not be read
(permissions, a torn network) is no fact about its bytes: it is not logged, and tried again.
Facts are held as columns, beside the candidates: what is known of a million files would take
longer to turn into objects than to find.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from operator import attrgetter

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from manifests.log import Log
from manifests.query import Source, fingerprint, query
from manifests.schema import FILES
from manifests.views import FILES_ORDER
from omnigen_pipe.images.candidates import Candidates
from omnigen_pipe.images.probe import Facts, Reading, read_files
from omnigen_pipe.mtimes import RACY_NS

#: The datasets by id, and the candidates of each; masks likewise, by `mask_files.log_name`. All of
#: these are numbered through, from 0.
Entries = Sequence[tuple[str, Candidates]]

_FACTS = ("content_hash", "format", "width", "height", "mode", "frames", "reason")

#: Columns of what one attempt to read a file gave: `Reading` and its `Facts`.
_READING_SCHEMA = pa.schema(
    [
        FILES.schema.field("read_at_ns").remove_metadata(),
        *(FILES.schema.field(name).remove_metadata() for name in _FACTS),
        pa.field("unreadable", pa.string()),
    ]
)


class Readings:
    """What reading each entry found: rows of `rows`, of which entry i has `row_of[i]`, or -1 where
    its file is not read yet. Those with a reason are not to be opened at all, and have none."""

    def __init__(self, entries: Entries, rows: pa.Table, row_of: npt.NDArray[np.int64]) -> None:
        self.rows = rows
        self.row_of = row_of
        self._refused = np.zeros(len(row_of), bool)
        start = 0
        for _, candidates in entries:
            if any(candidates.reasons):
                refused = [reason is not None for reason in candidates.reasons]
                self._refused[start : start + len(refused)] = refused
            start += len(candidates)

    def unread(self) -> npt.NDArray[np.int64]:
        """The numbers of the entries that are still to be read."""
        return np.flatnonzero((self.row_of < 0) & ~self._refused)

    def of(self, numbers: slice | npt.NDArray[np.int64]) -> pa.Table:
        """The columns of these entries; null where there is no reading."""
        places = self.row_of[numbers]
        if len(places) == self.rows.num_rows and (places == np.arange(len(places))).all():
            return self.rows
        return self.rows.take(pa.array(places, mask=places < 0))


def numbered(entries: Entries) -> dict[str, slice]:
    """The numbers of the entries of each name in `entries`."""
    found, start = {}, 0
    for name, candidates in entries:
        found[name] = slice(start, start + len(candidates))
        start += len(candidates)
    return found


def logged_rows(files: Source) -> pa.Table:
    """The rows of the `files` log, with the columns that `known_readings` needs."""
    columns = ", ".join((*FILES.key, "read_at_ns", *_FACTS))
    return query(f"SELECT {columns} FROM files", files=files)


def known_readings(entries: Entries, files: pa.Table) -> Readings:
    """For each entry what `files`, of `logged_rows`, say of it; nothing where that is too little.

    Of several rows for one entry the newest counts. They are looked for only where there are any:
    to put the whole log in order would take longer than all else.
    """
    tables = [
        pa.table(
            {
                "dataset": pa.repeat(pa.scalar(dataset, pa.string()), len(candidates)),
                "path": pa.array(candidates.paths, pa.string()),
                "size": pa.array(candidates.sizes, pa.int64()),
                "mtime_ns": pa.array(candidates.mtimes_ns, pa.int64()),
                "refused": pa.array(candidates.reasons, pa.string()),
            }
        )
        for dataset, candidates in entries
    ]
    if not tables:
        return Readings(entries, _READING_SCHEMA.empty_table(), np.empty(0, np.int64))
    found = pa.concat_tables(tables)
    found = found.append_column("entry", pa.array(np.arange(found.num_rows)))
    rows = query(
        f"""
        SELECT entry, abs(read_at_ns - mtime_ns) < ? AS racy, read_at_ns, {", ".join(_FACTS)}
        FROM found JOIN files USING (dataset, path, size, mtime_ns) WHERE refused IS NULL
        """,
        RACY_NS,
        found=found,
        files=files,
    )
    if len(np.unique(rows["entry"].to_numpy())) < rows.num_rows:
        newest = f"row_number() OVER (PARTITION BY entry ORDER BY {FILES_ORDER}) = 1"
        rows = query(f"SELECT * FROM rows QUALIFY {newest}", rows=rows)
    rows = rows.filter(pc.invert(rows["racy"])).drop_columns("racy")
    number = rows["entry"].to_numpy()
    if (np.diff(number) < 0).any():
        rows, number = rows.take(np.argsort(number)), np.sort(number)
    row_of = np.full(found.num_rows, -1, np.int64)
    row_of[number] = np.arange(rows.num_rows)
    rows = rows.drop_columns("entry").append_column(
        "unreadable", pa.nulls(rows.num_rows, pa.string())
    )
    return Readings(entries, rows.cast(_READING_SCHEMA), row_of)


def read_missing(
    entries: Entries,
    readings: Readings,
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
    unread = readings.unread()
    if not len(unread):
        return 0, 0
    names = [(dataset, c, number) for dataset, c in entries for number in range(len(c))]
    missing: dict[_State, list[int]] = {}
    for entry in unread.tolist():
        missing.setdefault(_state(*names[entry][1:]), []).append(entry)
    fresh: list[Reading] = []
    to_log: list[tuple[int, Reading]] = []
    opened = logged = 0

    def wanted() -> Iterator[_State]:
        for state in missing:
            if asked_to_stop():
                return
            yield state

    def fill_in(numbers: list[int], reading: Reading) -> None:
        for number in numbers:
            readings.row_of[number] = readings.rows.num_rows + len(fresh)
            if reading.facts is not None:
                to_log.append((number, reading))
        fresh.append(reading)
        advance(len(numbers))

    def publish() -> None:
        nonlocal logged
        if to_log:
            table = _log_rows([names[n] for n, _ in to_log], [r for _, r in to_log])
            log.append(table, fingerprint=fingerprint(table, list(log.manifest.key)))
        logged += len(to_log)
        to_log.clear()

    try:
        for numbers, reading in _read_under_other_names(readings, names, missing):
            fill_in(numbers, reading)
        published = time.monotonic()
        # Closed at once when anything fails, so that no thread reads on for nobody.
        with closing(read_files(wanted())) as reader:
            # Fewer readings than were missing where it was asked to stop.
            for numbers, reading in zip(missing.values(), reader, strict=False):
                opened += 1
                fill_in(numbers, reading)
                if time.monotonic() - published >= flush_seconds:
                    publish()
                    published = time.monotonic()
    finally:
        publish()
    readings.rows = pa.concat_tables([readings.rows, _as_table(fresh)])
    return opened, logged


#: A dataset, its candidates, and the number of one of them.
_Name = tuple[str, Candidates, int]

#: A file as it was at one time: where it lies, its size and its modification time.
_State = tuple[str, int, int]


def _state(candidates: Candidates, number: int) -> _State:
    size, mtime_ns = candidates.sizes[number], candidates.mtimes_ns[number]
    assert size is not None  # only None beside a reason
    assert mtime_ns is not None
    return candidates.reals[number], size, mtime_ns


def _read_under_other_names(
    readings: Readings, names: list[_Name], missing: dict[_State, list[int]]
) -> list[tuple[list[int], Reading]]:
    """Take out of `missing` the states that another entry has a reading of, with that reading."""
    found = []
    for entry in np.flatnonzero(readings.row_of >= 0).tolist():
        if not missing:
            break
        if same := missing.pop(_state(*names[entry][1:]), None):
            found.append((same, int(readings.row_of[entry])))
    places = pa.array([row for _, row in found], pa.int64())
    rows = readings.rows.take(places).to_pylist()
    return [
        (same, Reading(row["read_at_ns"], Facts(*(row[name] for name in _FACTS))))
        for (same, _), row in zip(found, rows, strict=True)
    ]


def _as_table(readings: Sequence[Reading]) -> pa.Table:
    """One row for each of `readings`."""
    nothing = (None,) * len(_FACTS)
    values = attrgetter(*_FACTS)
    facts = [nothing if r.facts is None else values(r.facts) for r in readings]
    by_name = zip(*facts, strict=True) if facts else [()] * len(_FACTS)
    columns: dict[str, Sequence[object]] = {
        "read_at_ns": [r.read_at_ns for r in readings],
        "unreadable": [r.unreadable for r in readings],
        **dict(zip(_FACTS, by_name, strict=True)),
    }
    return pa.table(
        [pa.array(columns[field.name], field.type) for field in _READING_SCHEMA],
        schema=_READING_SCHEMA,
    )


def _log_rows(names: Sequence[_Name], readings: Sequence[Reading]) -> pa.Table:
    """Rows of the `files` log: `readings` with facts, of the files with these `names`."""
    table = _as_table(readings)
    columns = {
        "dataset": pa.array([dataset for dataset, _, _ in names], pa.string()),
        "path": pa.array([c.paths[n] for _, c, n in names], pa.string()),
        "size": pa.array([c.sizes[n] for _, c, n in names], pa.int64()),
        "mtime_ns": pa.array([c.mtimes_ns[n] for _, c, n in names], pa.int64()),
        "status": pc.if_else(pc.is_null(table["reason"]), "ok", "rejected"),
        **{name: table[name] for name in ("read_at_ns", *_FACTS)},
    }
    return pa.table([columns[name] for name in FILES.schema.names], schema=FILES.schema)
