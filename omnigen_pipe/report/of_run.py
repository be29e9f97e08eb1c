"""The report of a run: its losses by t, rates, speed and memory, and its validation pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from manifests.errors import UsageError
from omnigen_pipe.progress import Progress
from omnigen_pipe.report.charts import Chart, Points, chart, finite, number
from omnigen_pipe.report.page import MOST_PICTURE_BYTES, check_output, publish, render_report
from omnigen_pipe.report.series import Point, Series, series
from omnigen_pipe.report.slides import slides
from omnigen_pipe.report.thumbnails import Album
from omnigen_pipe.runs.run import SETTINGS_NAME
from omnigen_pipe.runs.time_bins import CENTRES
from omnigen_pipe.summary import Summary
from omnigen_pipe.workspace import Workspace

#: The file in the run's folder that is written unless another is named.
NAME = "inspect.html"
#: Losses are shown as means over so many steps, as in training's own window.
_WINDOW = 50
#: The share of the last steps that the table of bins is of.
_LAST = 0.1


def write(
    workspace: Workspace,
    progress: Progress,
    name: str,
    output: Path | None = None,
    overwrite: bool = False,
) -> Summary:
    """Write the report of the run `name` to `output`, by default `inspect.html` in its folder.

    Raises `UsageError` where there is no such run, or `output` holds something else.
    """
    folder = _folder(workspace, name)
    output = output or folder / NAME
    check_output(output, overwrite)
    progress.note(f"inspect: reading {folder}")
    found = series(folder)
    album = Album(MOST_PICTURE_BYTES)
    last_step = found.points[-1].step if found.points else 0
    pictures, others = slides(folder, last_step, album)
    notes = []
    if not found.points:
        notes.append("No step has been trained yet: there are no numbers.")
    if album.refused:
        notes.append(f"{album.refused:,} validation pictures found no room on the page.")
    windows = found.windows(_WINDOW)
    page = render_report(
        "run.html.jinja",
        workspace,
        title=f"{name}: a run",
        notes=notes,
        series=found,
        bins=_bins(found),
        window=_WINDOW,
        losses=_losses("Loss and linear baseline", windows),
        by_t=_by_t(windows),
        others=_others(found, windows),
        evaluations=_evaluations(found),
        scores=_scores(found),
        slides=pictures,
        more_pictures=others,
        settings=_settings(folder),
    )
    size = publish(page, output, workspace.staging)
    shown = sum(len(one.slides) for one in pictures)
    return Summary(
        "inspect",
        changed=True,
        counts={
            "steps": found.steps,
            "points": len(found.points),
            "evaluations": len(found.evaluations),
            "pictures shown": shown,
            "bytes written": size,
        },
        notes=[*notes, f"Written to {output}"],
        details={"output": str(output), "run": name, "bins": _bins(found)},
    )


def _folder(workspace: Workspace, name: str) -> Path:
    """The folder of the run `name`; raises `UsageError` where there is none."""
    runs = workspace.root / "runs"
    there = sorted(path.name for path in runs.glob("*") if path.is_dir())
    if name not in there:
        raise UsageError(
            f"There is no run `{name}` in {runs}; there are: {', '.join(there) or 'none'}."
        )
    return runs / name


def _losses(title: str, windows: list[Point], place: int | None = None) -> Chart | None:
    """The loss of the rows with the plain target in one bin of t, or in all, and the linear
    baseline of the same rows."""
    return chart(
        title,
        "",
        [
            ("loss", "one", _points(windows, lambda point: point.loss(place))),
            ("linear baseline", "base", _points(windows, lambda point: point.baseline(place))),
        ],
    )


def _by_t(windows: list[Point]) -> list[Chart]:
    """The same for each bin of t."""
    charts = [
        _losses(f"t around {centre:.2f}", windows, place) for place, centre in enumerate(CENTRES)
    ]
    return [each for each in charts if each is not None]


def _others(found: Series, windows: list[Point]) -> list[Chart]:
    """Rate, speed, memory and gradient; Prodigy's own factor where it is measured."""
    charts = [
        _plain("Learning rate", "", "learning_rate", found.points),
        _plain("Speed", "samples/s", "samples_per_second", windows),
        _plain("Peak memory", "GiB", "memory_gib", found.points),
        _plain("Norm of the gradient", "", "grad_norm", windows),
        _plain("Prodigy's d", "", "prodigy_d", found.points),
    ]
    return [each for each in charts if each is not None]


def _plain(title: str, unit: str, name: str, points: list[Point]) -> Chart | None:
    return chart(title, unit, [(title.lower(), "one", _points(points, lambda p: p.mean(name)))])


def _points(points: list[Point], value: Callable[[Point], float]) -> Points:
    return [(point.step, value(point)) for point in points]


def _evaluations(found: Series) -> list[Chart]:
    """Evaluation's loss over the steps, and by t of the last one."""
    rows = found.evaluations
    lines: list[tuple[str, str, Points]] = [
        ("loss", "one", [(row["step"], finite(row.get("loss"))) for row in rows]),
        ("loss of the average", "two", [(row["step"], _average(row)) for row in rows]),
        ("linear baseline", "base", [(row["step"], _baseline(row)) for row in rows]),
    ]
    return [each for each in [chart("Evaluation: loss over the steps", "", lines)] if each]


def _scores(found: Series) -> Chart | None:
    """How well the validation pictures show their prompts, where CLIP has scored them."""
    lines = []
    for name, style, key in (
        ("mean score", "one", "clip_score"),
        ("mean score of the average", "two", "clip_score_ema"),
    ):
        points = [(row["step"], finite(row.get(key))) for row in found.scores]
        lines.append((name, style, points))
    return chart("CLIP score, of 100", "", lines)


def _average(row: dict[str, Any]) -> float:
    """The loss of the weights' average; NaN where there is none."""
    average = row.get("ema")
    return finite(average.get("loss")) if isinstance(average, dict) else math.nan


def _baseline(row: dict[str, Any]) -> float:
    """The mean baseline over the times of an evaluation; NaN where one is not known."""
    values = row.get("baseline")
    if not isinstance(values, list) or not values:
        return math.nan
    return sum(map(finite, values)) / len(values)


def _bins(found: Series) -> list[dict[str, Any]]:
    """Per bin of t, over the last tenth of the steps: `t`, `rows`, `loss`, `baseline`, and the
    share of the baseline that the model does without; None where no row is."""
    if not found.points:
        return []
    last = found.last(_LAST)
    rows = []
    for place, centre in enumerate(CENTRES):
        loss, baseline = last.loss(place), last.baseline(place)
        known = math.isfinite(loss) and baseline > 0
        rows.append(
            {
                "t": centre,
                "rows": int(last.rows[place]),
                "loss": loss if math.isfinite(loss) else None,
                "baseline": baseline if math.isfinite(baseline) else None,
                "explained": 1 - loss / baseline if known else None,
            }
        )
    return rows


def _settings(folder: Path) -> list[tuple[str, list[tuple[str, str]]]]:
    """What `run.json` says of settings and conditions, as named tables; none where it is gone or
    damaged, which `train` says."""
    try:
        entries = json.loads((folder / SETTINGS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    tables = []
    for title, key in (
        ("Settings, frozen at the start", "settings"),
        ("Settings that may change", "free"),
        ("Conditions", "conditions"),
    ):
        found = entries.get(key) if isinstance(entries, dict) else None
        if isinstance(found, dict) and found:
            shown = [(str(name), _shown(value)) for name, value in found.items()]
            tables.append((title, shown))
    return tables


def _shown(value: object) -> str:
    if isinstance(value, float):
        return number(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
