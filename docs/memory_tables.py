"""Writes the tables of `docs/memory.md` by `omnigen_pipe.memory`; `--check` says if they differ.

    python docs/memory_tables.py
    python docs/memory_tables.py --check

Takes about a minute. Run it after changing what training does between forward and backward.
"""

from __future__ import annotations

import sys
from pathlib import Path

from omnigen_pipe.config import LokrConfig, LokrPresetConfig, TrainConfig
from omnigen_pipe.memory.estimate import (
    GIB,
    PARTS,
    Activations,
    Prospect,
    counted,
    offered_bytes,
    traced_activations,
)
from omnigen_pipe.memory.skeleton import OMNIGEN_V1

PAGE = Path(__file__).resolve().parent / "memory.md"
BEGIN = "<!-- Made by docs/memory_tables.py: change that, then run it. -->\n"
END = "<!-- End of what it made. -->\n"

BUCKETS = ("512x512", "1024x1024")
#: The guide's names, and what heads their columns.
PRECISIONS = {"no_change": "bf16", "int8-quanto": "int8", "int4-quanto": "int4"}
CARDS = (8, 10, 12, 16, 24)
PROMPT_TOKENS = 128
QUICKSTART = LokrConfig()
ATTENTION = LokrConfig(apply_preset=LokrPresetConfig(target_module=("Attention",)))


def _prospects(lokr: LokrConfig, checkpointing: bool) -> dict[str, Prospect]:
    """By precision of the base; the activations are the same for each."""
    train = TrainConfig(gradient_checkpointing=checkpointing)
    traced: Activations = traced_activations(OMNIGEN_V1, train, lokr, BUCKETS, PROMPT_TOKENS)
    return {
        heading: counted(
            OMNIGEN_V1,
            train.model_copy(update={"base_model_precision": precision}),
            lokr,
            PROMPT_TOKENS,
            traced,
        )
        for precision, heading in PRECISIONS.items()
    }


def tables() -> str:
    """All tables of the page, as Markdown."""
    kept, recomputed = _prospects(QUICKSTART, False), _prospects(QUICKSTART, True)
    attention = _prospects(ATTENTION, True)
    return "\n".join(
        [
            *_parts(recomputed, kept),
            *(line for bucket in BUCKETS for line in _peaks(bucket, recomputed, kept)),
            *_cards(recomputed, kept, attention),
        ]
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"


def _parts(recomputed: dict[str, Prospect], kept: dict[str, Prospect]) -> list[str]:
    columns = {
        "bf16, 512 px": recomputed["bf16"].estimate("512x512", 1),
        "bf16, 1024 px": recomputed["bf16"].estimate("1024x1024", 1),
        "int8, 1024 px": recomputed["int8"].estimate("1024x1024", 1),
        "int4, 1024 px": recomputed["int4"].estimate("1024x1024", 1),
        "bf16, 512 px, no checkpointing": kept["bf16"].estimate("512x512", 1),
    }
    lines = ["### By part, batch 1, GiB", "", f"| part | {' | '.join(columns)} |"]
    lines.append("|---|" + "---:|" * len(columns))
    for part in PARTS:
        sizes = [getattr(estimate, part) for estimate in columns.values()]
        if any(sizes):
            lines.append(f"| {part} | {' | '.join(f'{size / GIB:.2f}' for size in sizes)} |")
    totals = " | ".join(f"**{e.total / GIB:.2f}**" for e in columns.values())
    return [*lines, f"| **total** | {totals} |", ""]


def _peaks(bucket: str, recomputed: dict[str, Prospect], kept: dict[str, Prospect]) -> list[str]:
    headings = [f"{name}, checkpointing" for name in recomputed] + [f"{n}, without" for n in kept]
    lines = [f"### Peak at {bucket}, GiB", "", f"| batch | {' | '.join(headings)} |"]
    lines.append("|---:|" + "---:|" * len(headings))
    for batch in range(1, 7):
        prospects = [*recomputed.values(), *kept.values()]
        totals = " | ".join(_gib(p.estimate(bucket, batch).total) for p in prospects)
        lines.append(f"| {batch} | {totals} |")
    return [*lines, ""]


def _cards(
    recomputed: dict[str, Prospect], kept: dict[str, Prospect], attention: dict[str, Prospect]
) -> list[str]:
    cases = {
        "bf16": recomputed["bf16"],
        "int8": recomputed["int8"],
        "int4": recomputed["int4"],
        "int8, attention only": attention["int8"],
        "int4, attention only": attention["int4"],
        "bf16, no checkpointing": kept["bf16"],
    }
    lines = ["### Largest batch that fits, 512 px / 1024 px", ""]
    lines += [f"| card | {' | '.join(cases)} |", "|---|" + "---|" * len(cases)]
    for card in CARDS:
        offered = offered_bytes(card)
        cells = [
            " / ".join(str(case.largest_batch(bucket, offered) or "none") for bucket in BUCKETS)
            for case in cases.values()
        ]
        lines.append(f"| {card} GB | {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> int:
    """Write the tables into the page, or with `--check` say whether they are what it has."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    wanted = f"{before}{BEGIN}\n{tables()}\n{END}{after}"
    if "--check" in sys.argv:
        if page != wanted:
            print("docs/memory.md is not current: run docs/memory_tables.py", file=sys.stderr)
        return int(page != wanted)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
