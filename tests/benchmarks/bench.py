"""What each stage costs, against what its unavoidable work costs: `make bench`.

    python tests/benchmarks/bench.py
    python tests/benchmarks/bench.py --rows start bucket --json figures.json
    python tests/benchmarks/bench.py --scale 0.01 --repeats 1

Each row is measured in turn with a bare loop, a few plain lines that do the same work with the
libraries alone (`bare.py`). All of it takes at most twenty minutes on two cores, and some GB of
disk in `--folder`, which is cleaned up. Rows are added to `ROWS`; what they are made of stands in
`table.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (2, 1)]  # this checkout

import data_rows  # noqa: E402
import train_rows  # noqa: E402
from table import Bench, Line, Row, as_text, machine  # noqa: E402

#: Every row, in the order of the table.
ROWS: tuple[Row, ...] = (*data_rows.ROWS, *train_rows.ROWS)


def main(arguments: list[str] | None = None) -> None:
    """Measure the chosen rows and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [row.name for row in ROWS]
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="ROW",
                        help=f"which: {', '.join(names)}; default: all")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3,
                        help="how often each takes its turn; brief ones take more")  # fmt: skip
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the amounts")
    parser.add_argument("--folder", type=Path, help="where to build; default: the system's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    chosen = parser.parse_args(arguments)
    lines: list[Line] = []
    seconds: dict[str, int] = {}
    started = time.monotonic()
    for row in ROWS:
        if row.name in chosen.rows:
            began = time.monotonic()
            print(f"{began - started:5.0f} s: {row.name}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="bench-", dir=chosen.folder) as folder:
                lines += row.lines(Bench(Path(folder), chosen.repeats, chosen.scale))
            seconds[row.name] = round(time.monotonic() - began)
            if chosen.json:  # after each row: what was measured outlives an interruption
                _write(chosen.json, chosen, lines, seconds)
    print(as_text(lines))
    if chosen.scale != 1:
        print(f"\nAmounts were multiplied by {chosen.scale:g}: the goals are meant for 1.")
    print(f"\n{time.monotonic() - started:.0f} s in all")


def _write(
    path: Path, chosen: argparse.Namespace, lines: list[Line], seconds: dict[str, int]
) -> None:
    found = {
        "machine": machine(),
        "scale": chosen.scale,
        "repeats": chosen.repeats,
        "seconds": sum(seconds.values()),
        "seconds_of_rows": seconds,
        "lines": [line.as_json() for line in lines],
    }
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
