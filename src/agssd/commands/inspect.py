"""List the cases of a cache."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agssd.data_modules.cache import CaseInfo, VolumeCache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``agssd inspect``."""
    parser.add_argument("cache", type=Path, help="cache file")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the cases; return 0, or 1 when the cache cannot be read."""
    from agssd.data_modules.cache import VolumeCache

    try:
        cache = VolumeCache(args.cache)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(as_json(cache), indent=2) if args.json else as_table(cache))
    return 0


def as_json(cache: VolumeCache) -> dict[str, object]:
    """Return all that the index holds, as plain lists, numbers and strings."""
    return {"class_names": list(cache.class_names), "cases": [case.to_json() for case in cache.cases]}


def as_table(cache: VolumeCache) -> str:
    """Return one line per case, and one line of totals."""
    head = ("key", "shape", "spacing mm", "modality", "channels", "labels", "class", "split", "subject", "foreground")
    rows = [head, *(_row(cache, case) for case in cache.cases)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    counts = ", ".join(f"{len(cache.select(split))} {split}" for split in ("train", "val", "test"))
    subjects = len({case.subject for case in cache.cases})
    return "\n".join([*lines, f"{len(cache)} cases of {subjects} subjects: {counts}"])


def _row(cache: VolumeCache, case: CaseInfo) -> tuple[str, ...]:
    values = case.label_values
    labels = "-" if values is None else " ".join(map(str, values)) if len(values) <= 6 else f"{len(values)} values"
    return (
        case.key,
        "x".join(map(str, case.shape)),
        "x".join(f"{size:.3g}" for size in case.spacing_mm),
        case.modality,
        str(case.channels),
        labels,
        "-" if case.class_index is None else cache.class_names[case.class_index],
        case.split,
        case.subject,
        f"{100 * case.foreground_fraction:.0f} %",
    )
