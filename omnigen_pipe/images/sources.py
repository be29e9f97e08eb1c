"""Where images come from: a folder, a list of paths, or a dataset repository on the hub.

All three end as candidates: files that may be images, each listed once, sorted by path, so
that nothing depends on the order in which a file system names them. Files are found and their
sizes and times asked for here; none but lists is opened. Given up: pictures embedded in
Parquet or in archives.
"""

from __future__ import annotations

import csv
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from manifests.errors import UsageError
from omnigen_pipe import hub
from omnigen_pipe.config import DatasetConfig
from omnigen_pipe.images.captions import LIST_STRATEGIES, from_value
from omnigen_pipe.images.probe import PICTURE_EXTENSIONS
from omnigen_pipe.workspace import Workspace

_LIST_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}

#: Leftovers of editors, file managers and network drives; those with a leading dot come on top.
_LEFTOVERS = frozenset({"Thumbs.db", "desktop.ini", "__MACOSX", "@eaDir", "#recycle"})

#: Folders of the workspace in which pictures may lie that are no training data.
_WORKSPACE_FOLDERS = ("manifests", "latents", "staging", "runs")

_HUB = re.compile(
    r"hf://datasets/(?P<repository>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(?P<folder>.*))?"
)


class Candidate(NamedTuple):
    """A file that may be an image.

    `path` is from the dataset's root, with `/`, escaped where it is not UTF-8; `real` is the
    file itself, without symbolic links. `size` (bytes) and `mtime_ns` are None where the file
    could not be asked, and then, or where its name rules it out, `reason` says why.
    """

    path: str
    real: str
    size: int | None
    mtime_ns: int | None
    reason: str | None


class Listed(NamedTuple):
    """What a list says about one image: its captions, or why it gives none."""

    texts: tuple[str, ...]
    reason: str | None


@dataclass
class Listing:
    """A list file: captions by path from the dataset's root.

    `outside` holds, by their text, the paths that lead outside the root or nowhere, with the
    reason. `size` (bytes) and `mtime_ns` are the list file's.
    """

    size: int
    mtime_ns: int
    rows: dict[str, Listed] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)


@dataclass
class Found:
    """What `find` found under `root`: candidates, sorted by path, the dataset's list, if it has
    one, and what to tell the user."""

    root: Path
    candidates: list[Candidate]
    listing: Listing | None = None
    notes: list[str] = field(default_factory=list)


def dataset_root(workspace: Workspace, dataset: DatasetConfig, refresh: bool = False) -> Path:
    """The absolute folder that the paths of `dataset` start at.

    For a dataset on the hub that is a folder of huggingface_hub's cache. With `refresh` the hub
    is asked for the newest state of the revision, and what is missing is downloaded; without,
    what is in the cache is used as it is. Raises `UsageError` where there is no such folder.
    """
    if dataset.instance_data_dir.startswith("hf://"):
        return _hub_root(workspace, dataset, refresh)
    root = workspace.path(dataset.instance_data_dir)
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise UsageError(
            f"dataset `{dataset.id}`: instance_data_dir {root} {what}. Correct the path in "
            f"{workspace.root / 'omnigen-pipe.toml'}, or mount the disk it is on."
        )
    return root


def find(workspace: Workspace, dataset: DatasetConfig, root: Path) -> Found:
    """Every file of `dataset` under `root` that may be an image.

    Raises `UsageError` where the root or the list cannot be used.
    """
    listing = None
    if dataset.source == "list" or dataset.caption_strategy in LIST_STRATEGIES:
        listing = read_listing(workspace, dataset, root)
    if dataset.source == "list":
        assert listing is not None  # said by the branch above
        found = Found(root, _listed_candidates(root, listing), listing)
    else:
        found = _walk(workspace, dataset, root)
        found.listing = listing
        if listing is not None:
            there = {candidate.path for candidate in found.candidates}
            absent = len(listing.outside) + sum(path not in there for path in listing.rows)
            if absent:
                found.notes.append(
                    f"dataset `{dataset.id}`: {absent:,} paths in {dataset.list_file} name no "
                    f"image that the walk of {root} found."
                )
    if not found.candidates:
        if dataset.instance_data_dir.startswith("hf://"):
            raise UsageError(_why_no_images(dataset))
        found.notes.append(f"dataset `{dataset.id}`: there are no images in {root}.")
    return found


# Walking a folder.


def _walk(workspace: Workspace, dataset: DatasetConfig, root: Path) -> Found:
    """All picture files under `root`, however deep, with symbolic links followed once.

    What is reached by real folders counts first, then linked folders in the order of their
    paths, then linked files; so which of several names a file is listed under does not depend
    on the order of directory entries. On the hub's side a link is how its cache stores a file,
    and several names of equal bytes are several files.
    """
    walk = _Walk(
        os.fspath(root),
        frozenset(os.path.realpath(workspace.root / name) for name in _WORKSPACE_FOLDERS),
        textfiles=dataset.caption_strategy == "textfile",
        list_file=None if dataset.list_file is None else _list_path(workspace, dataset, root),
    )
    if not os.access(root, os.R_OK | os.X_OK):
        raise UsageError(f"dataset `{dataset.id}`: {root} may not be read. Check its permissions.")
    walk.folders([""])
    distinct = not dataset.instance_data_dir.startswith("hf://")
    walk.links(distinct)
    return Found(root, _with_distinct_paths(walk.candidates), None, walk.notes(dataset.id))


class _Walk:
    """One walk: what it has seen, so that nothing is seen twice, and what it left aside."""

    def __init__(
        self, root: str, not_data: frozenset[str], textfiles: bool, list_file: Path | None
    ) -> None:
        self.root = root
        self.not_data = not_data
        self.textfiles = textfiles
        self.list_file = None if list_file is None else os.path.realpath(list_file)
        self.seen: set[str] = set()  # real paths of folders
        self.candidates: list[Candidate] = []
        self.file_links: list[str] = []
        self.others: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.unreadable: list[str] = []

    def folders(self, links: list[str]) -> None:
        """Walk the folders in `links` (paths from the root), then those linked from them."""
        while links:
            further: list[str] = []
            for path in sorted(links):
                full = os.path.join(self.root, path) if path else self.root
                real = os.path.realpath(full)
                # A link to a folder that it lies in would lead round and round.
                lies_in = os.path.realpath(os.path.dirname(full)) + "/"
                if path and lies_in.startswith(real.rstrip("/") + "/"):
                    self.counts["loops"] += 1
                else:
                    self._descend(path, real, further)
            links = further

    def _descend(self, path: str, real: str, links: list[str]) -> None:
        stack = [(path, real)]
        while stack:
            path, real = stack.pop()
            if real in self.seen:
                self.counts["twice"] += 1
                continue
            if path and real in self.not_data:
                self.counts["workspace"] += 1
                continue
            self.seen.add(real)
            try:
                with os.scandir(os.path.join(self.root, path) if path else self.root) as entries:
                    for entry in entries:
                        self._entry(entry, path, real, stack, links)
            except FileNotFoundError:
                continue  # deleted since it was listed
            except OSError as error:
                self.unreadable.append(f"{escaped(path)} ({error.strerror})")

    def _entry(
        self,
        entry: os.DirEntry[str],
        folder: str,
        real: str,
        stack: list[tuple[str, str]],
        links: list[str],
    ) -> None:
        name = entry.name
        path = f"{folder}/{name}" if folder else name
        if _is_left_aside(name):
            self.counts["hidden"] += 1
        elif entry.is_dir(follow_symlinks=False):
            stack.append((path, os.path.join(real, name)))
        elif entry.is_symlink() and _is_folder(entry):
            links.append(path)
        elif not is_picture_name(name):
            self._other(name, os.path.join(real, name))
        elif entry.is_symlink():
            self.file_links.append(path)
        else:
            try:
                self.candidates.append(
                    _candidate(path, os.path.join(real, name), entry.stat(follow_symlinks=False))
                )
            except FileNotFoundError:
                pass  # deleted since it was listed
            except OSError as error:
                self.candidates.append(_refused(path, f"unreadable: {error.strerror}"))

    def _other(self, name: str, real: str) -> None:
        extension = os.path.splitext(name)[1].lower()
        if self.textfiles and extension == ".txt":
            return
        if self.list_file is not None and os.path.realpath(real) == self.list_file:
            return
        self.others[escaped(extension) or "without extension"] += 1

    def links(self, distinct: bool) -> None:
        """List the linked files; with `distinct`, none whose target is listed already."""
        reached: set[str] = set()
        for path in sorted(self.file_links):
            full = os.path.join(self.root, path)
            real = os.path.realpath(full)
            folder, name = os.path.split(real)
            listed = folder in self.seen and is_picture_name(name) and not _is_left_aside(name)
            if distinct and (real in reached or (listed and os.path.isfile(real))):
                self.counts["twice"] += 1
                continue
            reached.add(real)
            self.candidates.append(_asked(path, full, "the link leads nowhere"))

    def notes(self, dataset: str) -> list[str]:
        """What was left aside, in sentences."""
        sentences = {
            "hidden": "{} hidden or leftover files and folders were left aside.",
            "twice": "{} links lead to what is listed under another name; listed once.",
            "loops": "{} links lead to a folder that they lie in; not followed.",
            "workspace": "{} folders of the workspace itself were left aside.",
        }
        notes = [s.format(f"{self.counts[k]:,}") for k, s in sentences.items() if self.counts[k]]
        if self.others:
            kinds = sorted(self.others.items(), key=lambda item: (-item[1], item[0]))
            listed = ", ".join(f"{number:,} {kind}" for kind, number in kinds[:8])
            more = f" and {len(kinds) - 8} more kinds" if len(kinds) > 8 else ""
            total = sum(self.others.values())
            notes.append(f"{total:,} files are no pictures by their names: {listed}{more}.")
        if self.unreadable:
            number, first = len(self.unreadable), min(self.unreadable)
            notes.append(f"{number:,} folders could not be read, the first: {first}.")
        return [f"dataset `{dataset}`: {note}" for note in notes]


def is_picture_name(name: str) -> bool:
    """Whether the extension is one of a picture format."""
    return os.path.splitext(name)[1].lower() in PICTURE_EXTENSIONS


def _is_left_aside(name: str) -> bool:
    return name.startswith((".", "~$")) or name.endswith("~") or name in _LEFTOVERS


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads round to itself
        return False


# Candidates.


def escaped(path: str) -> str:
    """`path` as UTF-8 text; what is not UTF-8 in it becomes `\\xNN`, and each `\\` then `\\\\`."""
    try:
        path.encode("utf-8")
        return path
    except UnicodeEncodeError:
        doubled = path.replace("\\", "\\\\")
        try:
            return os.fsencode(doubled).decode("utf-8", "backslashreplace")
        except UnicodeEncodeError:  # from a list: half a character, which no file name holds
            return doubled.encode("utf-8", "backslashreplace").decode("utf-8")


def _candidate(path: str, real: str, facts: os.stat_result) -> Candidate:
    text = escaped(path)
    reason = None
    if text != path:
        reason = "name is not UTF-8: rename the file"
    elif not stat.S_ISREG(facts.st_mode):
        reason = "not a regular file"
    return Candidate(text, real, facts.st_size, facts.st_mtime_ns, reason)


def _refused(path: str, reason: str) -> Candidate:
    text = escaped(path)
    name = "name is not UTF-8: rename the file"
    return Candidate(text, "", None, None, reason if text == path else name)


def _asked(path: str, full: str, absent: str) -> Candidate:
    """The candidate at `full`; `absent` is the reason where there is none."""
    try:
        return _candidate(path, os.path.realpath(full), os.stat(full))
    except (FileNotFoundError, NotADirectoryError):
        return _refused(path, absent)
    except OSError as error:
        return _refused(path, f"unreadable: {error.strerror}")
    except ValueError:  # a zero byte, or half a character
        return _refused(path, absent)


def _with_distinct_paths(candidates: list[Candidate]) -> list[Candidate]:
    """`candidates` by path; an escaped name that looks like another's gets a mark."""
    taken: set[str] = set()
    distinct = []
    # Good names first: theirs must not change.
    for candidate in sorted(candidates, key=lambda c: (c.reason is not None, c.path, c.real)):
        path = candidate.path
        while path in taken:
            path += "'"
        taken.add(path)
        distinct.append(candidate._replace(path=path))
    return sorted(distinct, key=lambda c: c.path)


# Lists.


def _list_path(workspace: Workspace, dataset: DatasetConfig, root: Path) -> Path:
    """The list file: from the workspace or, where there is none, from the dataset's root."""
    assert dataset.list_file is not None  # the configuration demands one for every list
    places = [workspace.path(dataset.list_file), root / dataset.list_file]
    for place in places:
        if place.is_file():
            return place
    raise UsageError(
        f"dataset `{dataset.id}`: there is no list_file {dataset.list_file}, neither at "
        f"{places[0]} nor at {places[1]}."
    )


def read_listing(workspace: Workspace, dataset: DatasetConfig, root: Path) -> Listing:
    """The rows of `dataset.list_file`, with several rows for one path merged in their order.

    Raises `UsageError` for a list that cannot be read, or lacks a column that is asked for.
    """
    path = _list_path(workspace, dataset, root)
    where = f"dataset `{dataset.id}`: {path}"
    by_name = _LIST_KINDS.get(path.suffix.lower())
    strategy = dataset.caption_strategy
    kind = strategy if strategy in LIST_STRATEGIES else by_name
    if kind is None:
        raise UsageError(f"{where} must end in {', '.join(_LIST_KINDS)}.")
    if by_name is not None and by_name != kind:
        raise UsageError(f'{where} is no {kind}, but caption_strategy is "{strategy}".')
    caption_column = dataset.caption_column if strategy in LIST_STRATEGIES else None
    readers = {"jsonl": _jsonl_rows, "csv": _csv_rows, "parquet": _parquet_rows}
    roots = (os.path.abspath(root), os.path.realpath(root))
    try:
        facts = path.stat()
        listing = Listing(facts.st_size, facts.st_mtime_ns)
        for number, text, value, fault in readers[kind](
            where, path, dataset.path_column, caption_column
        ):
            if not isinstance(text, str) or not text:
                raise UsageError(
                    f"{where}: row {number} has no path in `{dataset.path_column}`. Correct it "
                    "or delete the row."
                )
            texts, reason = from_value(value) if caption_column else ([], None)
            name, outside = _inside(text, roots)
            if outside is not None:
                listing.outside[name] = outside
            else:
                before = listing.rows.get(name, Listed((), None))
                merged = (*before.texts, *(() if fault else texts))
                listing.rows[name] = Listed(merged, None if merged else fault or reason)
    except OSError as error:
        raise UsageError(f"{where} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not UTF-8 text: {error}") from error
    return listing


#: Row number, path, caption, and what is wrong with the row as a whole.
_Row = tuple[int, object, object, str | None]


def _no_column(where: str, column: str, columns: Iterable[object]) -> UsageError:
    known = ", ".join(f"`{c}`" for c in columns) or "none"
    return UsageError(
        f"{where} has no column `{column}`; its columns are {known}. Set path_column and "
        "caption_column."
    )


def _jsonl_rows(where: str, path: Path, column: str, caption: str | None) -> Iterator[_Row]:
    keys: dict[str, None] = {}
    number = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                raise UsageError(f"{where}: line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UsageError(f"{where}: line {number} is not a JSON object ({{…}}).")
            keys.update(dict.fromkeys(row))
            if column not in row and column not in keys:
                raise _no_column(where, column, keys)
            yield number, row.get(column), row.get(caption) if caption else None, None
    if keys and caption is not None and caption not in keys:
        raise _no_column(where, caption, keys)


def _csv_rows(where: str, path: Path, column: str, caption: str | None) -> Iterator[_Row]:
    with path.open(encoding="utf-8-sig", newline="") as handle:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        reader = csv.DictReader(handle, delimiter=delimiter, strict=True)
        try:
            columns = reader.fieldnames or ()
            for wanted in (column, caption):
                if wanted is not None and wanted not in columns:
                    raise _no_column(where, wanted, columns)
            for row in reader:
                fault = None
                if None in row:
                    fault = "no caption: the list's row has more fields than its header"
                value = row[caption] if caption else None
                yield reader.line_num, row[column], value, fault
        except csv.Error as error:
            raise UsageError(f"{where}: line {reader.reader.line_num}: {error}") from error


def _parquet_rows(where: str, path: Path, column: str, caption: str | None) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            for wanted in (column, caption):
                if wanted is not None and wanted not in table.schema_arrow.names:
                    raise _no_column(where, wanted, table.schema_arrow.names)
            wanted_columns = [column] if caption is None else list(dict.fromkeys((column, caption)))
            number = 0
            for batch in table.iter_batches(columns=wanted_columns):
                paths = batch.column(column).to_pylist()
                values = batch.column(caption).to_pylist() if caption else [None] * len(paths)
                for text, value in zip(paths, values, strict=True):
                    number += 1
                    yield number, text, value, None
    except pa.ArrowException as error:
        raise UsageError(f"{where} is not a readable Parquet file: {error}") from error


def _inside(text: str, roots: tuple[str, ...]) -> tuple[str, str | None]:
    """The path that `text` names from the root, or as written and why it leads nowhere there.

    Only the text is judged: a link inside the root may lead outside, as in a walk.
    """
    shown = escaped(text)
    if shown != text:
        return shown, "name is not UTF-8: rename the file"
    path = os.path.normpath(text)
    for root in roots:
        if path.startswith(root.rstrip("/") + "/"):
            path = path[len(root.rstrip("/")) + 1 :]
            break
    if os.path.isabs(path) or path == ".." or path.startswith("../"):
        return path, "outside the dataset: the list's path leaves instance_data_dir"
    return path, None


def _listed_candidates(root: Path, listing: Listing) -> list[Candidate]:
    absent = "not there: the list names a file that does not exist"
    found = [_asked(path, os.path.join(root, path), absent) for path in listing.rows]
    found += [Candidate(path, "", None, None, why) for path, why in listing.outside.items()]
    return sorted(found, key=lambda candidate: candidate.path)


# The hub.


def _hub_parts(dataset: DatasetConfig) -> tuple[str, str | None, str]:
    """Repository, revision and subfolder of `hf://datasets/OWNER/NAME@REVISION/SUBFOLDER`."""
    match = _HUB.fullmatch(dataset.instance_data_dir)
    folder = "" if match is None else (match["folder"] or "").strip("/")
    if match is None or ".." in folder.split("/"):
        raise UsageError(
            f"dataset `{dataset.id}`: instance_data_dir {dataset.instance_data_dir} is not of the "
            "form hf://datasets/OWNER/NAME, with an optional @REVISION and /SUBFOLDER."
        )
    revision = unquote(match["revision"]) if match["revision"] else None
    return match["repository"], revision, folder


def _hub_patterns(dataset: DatasetConfig, folder: str) -> list[str]:
    """The files to download, as huggingface_hub's patterns: pictures and captions."""
    extensions = sorted(PICTURE_EXTENSIONS)
    if dataset.caption_strategy == "textfile":
        extensions.append(".txt")
    start = _plain(folder + "/" if folder else "")
    patterns = []
    for extension in extensions:
        # The patterns know upper from lower case, and extensions come in both.
        either = "".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in extension)
        patterns.append(f"{start}*{either}")
    if dataset.list_file is not None:
        patterns.append(start + _plain(dataset.list_file))
    return patterns


def _plain(path: str) -> str:
    """A pattern that matches `path` alone."""
    return re.sub(r"([*?[])", r"[\1]", path)


def _hub_root(workspace: Workspace, dataset: DatasetConfig, refresh: bool) -> Path:
    repository, revision, folder = _hub_parts(dataset)
    root = hub.fetch(
        repository,
        "dataset",
        revision,
        _hub_patterns(dataset, folder),
        what=f"dataset `{dataset.id}`: {dataset.instance_data_dir}",
        refresh=refresh,
    )
    root = root / folder if folder else root
    if not root.is_dir():
        raise UsageError(_why_no_images(dataset))
    return root


def _why_no_images(dataset: DatasetConfig) -> str:
    """A sentence for a repository in which no picture was found, with what it holds instead."""
    from huggingface_hub import HfApi

    repository, revision, folder = _hub_parts(dataset)
    try:
        names = HfApi().list_repo_files(repository, revision=revision, repo_type="dataset")
        inside = [name for name in names if not folder or name.startswith(folder + "/")]
        kinds = Counter(os.path.splitext(name)[1] or "without extension" for name in inside)
        listed = ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common(5))
        holds = f"It holds {listed}." if listed else "It holds no file at all."
    except hub.errors():
        holds = "What it holds instead could not be asked."
    return (
        f"dataset `{dataset.id}`: {dataset.instance_data_dir} has no image files. {holds} Pictures "
        "embedded in Parquet files or archives are not supported: export them as image files "
        "first, and name their folder in instance_data_dir."
    )
