"""Pictures that are drawn and saved: dated by what they show."""

from __future__ import annotations

import random
import time
from pathlib import Path

from omnigen_pipe.mtimes import RACY_NS
from omnigen_pipe.world.drawing import save
from omnigen_pipe.world.scenes import imagine


def test_a_picture_s_date_is_past_and_its_content_s(tmp_path: Path) -> None:
    draw = random.Random("dates")
    scenes = [imagine(draw) for _ in range(40)]
    dates = []
    for scene in scenes:
        save(scene, tmp_path / "one.png")
        save(scene, tmp_path / "other.png")
        date = (tmp_path / "one.png").stat().st_mtime_ns
        assert (tmp_path / "other.png").stat().st_mtime_ns == date
        assert 2020 <= time.gmtime(date // 10**9).tm_year <= 2022
        assert date < time.time_ns() - RACY_NS
        dates.append(date)
    assert len(set(dates)) == len({scene.things for scene in scenes})
