"""A survey: what discover would find now, as far as that is known without opening pictures.

Nothing is written and nothing downloaded. Changed caption files are read, since their text
decides what follows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from manifests.errors import UsageError
from manifests.query import Source, query
from omnigen_pipe.config import DatasetConfig
from omnigen_pipe.images.candidates import Candidates
from omnigen_pipe.images.catalogue import image_rows, known_captions
from omnigen_pipe.images.hub_dataset import is_cached
from omnigen_pipe.images.mask_files import log_name, stem
from omnigen_pipe.images.reading import known_readings, logged_rows, numbered
from omnigen_pipe.images.sources import Found, dataset_root, find
from omnigen_pipe.workspace import Workspace


@dataclass
class Survey:
    """Rows of images as discover would write them, as far as is known without opening files.

    `unread` counts the files that it would open, and `unread_bytes` is their size. The images of
    these files, or masks, that images.parquet knows under the same name, `unread_known`, stand in
    `images` as they were.
    """

    images: pa.Table | Source
    unread: int = 0
    unread_bytes: int = 0
    unread_known: int = 0
    notes: list[str] = field(default_factory=list)


def survey(workspace: Workspace) -> Survey:
    """Look at the files of every dataset."""
    datasets = sorted(workspace.config.datasets, key=lambda dataset: dataset.id)
    notes: list[str] = []
    found = {dataset.id: _find(workspace, dataset, notes) for dataset in datasets}
    entries = [(d.id, found[d.id].candidates) for d in datasets]
    masks = {d.id: each for d in datasets if (each := found[d.id].masks) is not None}
    entries += [(log_name(d), masks[d.id].candidates) for d in datasets if d.id in masks]
    places = numbered(entries)
    readings = known_readings(entries, logged_rows(workspace.files.source()))
    known = known_captions(workspace.images, datasets)
    tables = [workspace.images.manifest.empty()]
    names: dict[str, list[str]] = {"dataset": [], "path": []}
    unread = set(readings.unread().tolist())
    sizes = [size for _, candidates in entries for size in candidates.sizes]
    unread_bytes = sum(sizes[number] or 0 for number in unread)
    for dataset in datasets:
        this = found[dataset.id]
        place = places[dataset.id]
        numbers = range(place.start, place.stop)
        waiting = unread.intersection(numbers)
        of_masks = None
        if this.masks is not None:
            # An image whose mask is not read yet waits with it.
            place = places[log_name(dataset)]
            of_masks = this.masks, readings.of(place)
            stems = this.masks.stems(
                n - place.start for n in unread if n in range(place.start, place.stop)
            )
            if stems:
                paths = zip(numbers, this.candidates.paths, strict=True)
                waiting |= {number for number, path in paths if stem(path) in stems}
        ready = np.array([n for n in numbers if n not in waiting], np.int64)
        rest = this.candidates.take(n - numbers.start for n in numbers if n in waiting)
        names["dataset"] += [dataset.id] * len(rest)
        names["path"] += rest.paths
        candidates = this.candidates.take((ready - numbers.start).tolist())
        read = readings.of(ready)
        tables.append(
            image_rows(dataset, this.root, candidates, read, this.listing, known, of_masks)
        )
    # Until such a file is read, what was known of it stands for it.
    before = query(
        "SELECT * FROM images SEMI JOIN names USING (dataset, path)",
        names=pa.table({name: pa.array(column, pa.string()) for name, column in names.items()}),
        images=workspace.images.source(),
    )
    return Survey(
        pa.concat_tables([*tables, before.cast(workspace.images.manifest.schema)]),
        unread=len(unread),
        unread_bytes=unread_bytes,
        unread_known=before.num_rows,
        notes=notes,
    )


def _find(workspace: Workspace, dataset: DatasetConfig, notes: list[str]) -> Found:
    """The candidates of `dataset`; none, with a note, where its files are not within reach."""
    nothing = Found(workspace.root, Candidates())
    if dataset.instance_data_dir.startswith("hf://") and not is_cached(dataset):
        notes.append(f"dataset {dataset.id}: {dataset.instance_data_dir} is not fetched yet")
        return nothing
    try:
        found = find(workspace, dataset, dataset_root(workspace, dataset))
    except UsageError as error:
        notes.append(str(error))
        return nothing
    notes += found.notes
    return found
