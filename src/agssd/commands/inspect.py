"""List the cases of a cache, and draw some of them."""

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
    parser.add_argument("--draw", type=Path, metavar="FILE.png", help="also draw cases with foreground and label")
    parser.add_argument(
        "--cases", type=int, default=4, metavar="N", help="how many to draw, spread evenly (default: 4)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the cases; return 0, or 1 when the cache cannot be read."""
    from agssd.data_modules.cache import VolumeCache

    try:
        cache = VolumeCache(args.cache)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(as_json(cache), indent=2) if args.json else as_table(cache))
    if args.draw is None:
        return 0
    try:
        drawn = draw(cache, args.draw, args.cases)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"drawn {', '.join(drawn)} in {args.draw}", file=sys.stderr)
    return 0


def as_json(cache: VolumeCache) -> dict[str, object]:
    """Return all that the index holds, as plain lists, numbers and strings."""
    return {"class_names": list(cache.class_names), "cases": [case.to_json() for case in cache.cases]}


def as_table(cache: VolumeCache) -> str:
    """Return one line per case, and one line of totals."""
    head = (
        "key",
        "shape",
        "spacing mm",
        "modality",
        "channels",
        "labels",
        "regions",
        "class",
        "split",
        "subject",
        "foreground",
    )
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
        "x".join(f"{size:.3g}" for size in case.spacing_mm[-case.spatial_dims :]) if case.in_mm else "in pixels",
        case.modality,
        str(case.channels),
        labels,
        "-" if case.num_regions is None else str(case.num_regions),
        "-" if case.class_index is None else cache.class_names[case.class_index],
        case.split,
        case.subject,
        f"{100 * case.foreground_fraction:.0f} %",
    )


def draw(cache: VolumeCache, path: Path, count: int) -> list[str]:
    """Draw ``count`` cases, one row each: three planes through the middle of the body, and return their keys.

    The outline of the foreground is blue, labels are coloured. Up is superior or anterior, to the right lies the
    patient's right or front. Of sequences the first, the middle and the last frame are drawn as they are. Keys are the
    salted ones of the cache; nothing else names a case.

    Args:
        cache: open cache.
        path: PNG to write; it appears whole or not at all.
        count: cases, spread evenly over the cache.

    Raises:
        ValueError: if there is nothing to draw or the place cannot be written.
    """
    import os

    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if path.suffix.lower() != ".png":
        raise ValueError(f"--draw {path}: the name must end in .png")
    if count < 1 or not len(cache):
        raise ValueError(f"--cases is {count} and {cache.path} has {len(cache)} cases; there is nothing to draw")
    rows = np.unique(np.linspace(0, len(cache) - 1, min(count, len(cache))).round().astype(int)).tolist()
    figure = Figure(figsize=(9, 3.1 * len(rows)), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for row, places in zip(rows, axes, strict=True):
        info = cache.cases[row]
        image = cache.read_whole(row, "image")[0].astype(np.float32) * info.scale[0] + info.offset[0]
        body = cache.read_whole(row, "foreground")
        label = cache.read_whole(row, "label") if info.label_values is not None else None
        if label is not None and label.any():
            middle = [int(np.median(found)) for found in np.nonzero(label)]
        else:
            middle = [(low + high) // 2 for low, high in info.foreground_box]
        top = max(info.label_values or (1,))
        planes = [(axis, middle[axis], name) for axis, name in enumerate(("axial", "coronal", "sagittal"))]
        if info.spatial_dims == 2:
            planes = [(0, frame, "frame") for frame in (0, (info.shape[0] - 1) // 2, info.shape[0] - 1)]
        for place, (axis, index, name) in zip(places, planes, strict=True):
            up, right = [i for i in range(3) if i != axis]
            settings = {"origin": "lower", "aspect": info.spacing_mm[up] / info.spacing_mm[right]}
            if info.spatial_dims == 2:
                settings["origin"] = "upper"
            place.imshow(np.take(image, index, axis), cmap="gray", vmin=info.low[0], vmax=info.high[0], **settings)
            cut = np.take(body, index, axis)
            if cut.min() < cut.max():
                place.contour(cut, levels=[0.5], colors="tab:cyan", linewidths=0.8)
            if label is not None:
                values = np.ma.masked_equal(np.take(label, index, axis), 0)
                place.imshow(
                    values, cmap="tab10" if top < 10 else "turbo", vmin=0, vmax=max(top, 9), alpha=0.5, **settings
                )
            place.set_axis_off()
            place.set_title(f"{name} {index}", fontsize=8, loc="left")
        spacing = "x".join(f"{size:.3g}" for size in info.spacing_mm[-info.spatial_dims :])
        head = f"{info.key}, {info.modality}, {info.split}, {f'{spacing} mm' if info.in_mm else 'in pixels'}"
        places[0].set_title(f"{head}\n{planes[0][2]} {planes[0][1]}", fontsize=8, loc="left")
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(partial, format="png")
        partial.replace(path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return [cache.cases[row].key for row in rows]
