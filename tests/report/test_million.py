"""A million images: the page opens, for it holds samples and sums."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from browser import browser, executable
from made import QUIET, workspace

from manifests.query import query
from manifests.schema import IMAGES
from omnigen_pipe.images.samples import make_samples, samples_settings
from omnigen_pipe.report import of_workspace
from omnigen_pipe.report.of_workspace import Options
from omnigen_pipe.report.page import MOST_BYTES
from omnigen_pipe.settings import as_text

COUNT = 1_000_000
#: Several times what it takes on two slow cores.
SECONDS = 300


@pytest.mark.slow
def test_a_million_images_give_a_page_that_opens(tmp_path: Path) -> None:
    folder = {"instance_data_dir": "a", "resolution": 64, "resolution_type": "pixel"}
    place = workspace(
        tmp_path,
        {"id": "a", "minimum_image_size": 700, **folder},
        {"id": "held", "dataset_type": "eval", **folder},
    )
    (tmp_path / "a").mkdir()
    images = query(
        """
        SELECT CASE WHEN n % 100 = 0 THEN 'held' ELSE 'a' END AS dataset,
               'part-' || (n // 1000) || '/' || n || '.jpg' AS path, n AS size, n AS mtime_ns,
               md5((n - CASE WHEN n % 50 = 1 THEN 1 ELSE 0 END)::VARCHAR) AS content_hash,
               'JPEG' AS format, 'RGB' AS mode, 1 AS frames,
               600 + (n * 7919) % 3001 AS width, 600 + (n * 104729) % 2999 AS height,
               ['a photograph of ' || left(md5(n::VARCHAR), 6) || ' among many others'] AS captions,
               CASE WHEN n % 20 = 3 THEN 'rejected' ELSE 'ok' END AS status,
               CASE WHEN n % 20 = 3 THEN 'damaged: ' || n END AS reason
        FROM range($1) AS numbers(n) ORDER BY dataset, path
        """,
        COUNT,
    )
    whole = query("SELECT * FROM e UNION ALL BY NAME SELECT * FROM i", e=IMAGES.empty(), i=images)
    place.images.replace(whole.select(IMAGES.schema.names).cast(IMAGES.schema), fingerprint="test")
    place.samples.replace(
        make_samples(place.images.source(), place.config),
        settings=as_text(samples_settings(place.config)),
    )
    began = time.monotonic()
    summary = of_workspace.write(place, QUIET, Options(decoded=0))
    assert time.monotonic() - began < SECONDS
    counts = summary.counts
    assert (
        counts["images"]
        == COUNT
        == sum(counts[state] for state in ("used", "filtered", "rejected", "waiting"))
    )
    assert counts["rejected"] == COUNT // 20
    twins = query(
        """
        SELECT count(*) AS n FROM samples AS one WHERE status = 'ok' AND split = 'eval' AND EXISTS (
            FROM samples AS other WHERE other.content_hash = one.content_hash
            AND other.split = 'train' AND other.status = 'ok')
        """,
        samples=place.samples.source(),
    )["n"][0].as_py()
    assert summary.details["duplicates"]["same_bytes"]["leaking"] == twins > COUNT // 200
    assert counts["bytes written"] < MOST_BYTES
    program = executable()
    if program is not None:
        with browser(program) as page:
            page.open(tmp_path / "inspect.html", 360)
            assert page.asks("document.documentElement.scrollWidth") <= 360
            assert page.asks("document.querySelectorAll('.card').length") > 0
