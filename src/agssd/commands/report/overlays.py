"""Segmentation of test cases: the spread of Dice over cases, and best, median and worst drawn over the image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agssd.commands.report.run_files import Run, last_checkpoint, short_key
from agssd.commands.report.volumes import Layer, as_grey, css_colour, shrink_factors, shrunk, viewer
from agssd.types import Triple

if TYPE_CHECKING:
    from agssd.data_modules.cache import VolumeCache
    from agssd.tasks.segmentation import SegmentationTask

_TOLERANCE = 0.01  # of a recomputed Dice


@dataclass(frozen=True)
class Score:
    """A test case: key, Dice per class (NaN where it is neither there nor predicted), their mean."""

    key: str
    dice: list[float]
    mean: float


def scores_of(run: Run) -> list[Score]:
    """Return the test cases of a segmentation from the lowest to the highest mean Dice; none for other tasks."""
    found = []
    for row in run.test_cases:
        dice = [float(row[name] or "nan") for name in row if name.startswith("dice_class")]
        present = [value for value in dice if not math.isnan(value)]
        if present:
            found.append(Score(row["case"], dice, sum(present) / len(present)))
    return sorted(found, key=lambda score: score.mean)


def chosen(scores: Sequence[Score]) -> list[tuple[str, Score]]:
    """Return (name, case) for best, median and worst; a case stands for one of them only."""
    places = {"best": len(scores) - 1, "median": (len(scores) - 1) // 2, "worst": 0}
    taken: dict[int, str] = {}
    for name in ("best", "worst", "median"):
        taken.setdefault(places[name], name)
    return [(name, scores[place]) for name, place in places.items() if taken.get(place) == name]


def spread(scores: Sequence[Score]) -> str:
    """Return a drawing of Dice per class over the cases, with the mean of each."""
    classes = max(len(score.dice) for score in scores)
    height, left, wide = 34 * classes + 40, 62, 330
    lines, dots, told = [], [], []
    for tick in range(6):
        x = left + wide * tick / 5
        lines.append(f'<line class="grid" x1="{x:.0f}" x2="{x:.0f}" y1="6" y2="{height - 26}"/>')
        lines.append(f'<text x="{x:.0f}" y="{height - 8}" text-anchor="middle">{tick / 5:.1f}</text>')
    for index in range(classes):
        values = [score.dice[index] for score in scores if not math.isnan(score.dice[index])]
        y = 24 + 34 * index
        lines.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">class {index + 1}</text>')
        if not values:
            continue
        for number, value in enumerate(values):
            offset = (number * 0.618 % 1 - 0.5) * 16  # spread, so that equal values stay visible
            dots.append(
                f'<circle class="dot s{index % 8}" cx="{left + wide * value:.1f}" cy="{y + offset:.1f}" r="3">'
                f"<title>{value:.3f}</title></circle>"
            )
        mean = sum(values) / len(values)
        x = left + wide * mean
        dots.append(f'<line class="mean" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 13}" y2="{y + 13}"/>')
        told.append(f"class {index + 1}: mean {mean:.3f}, {min(values):.3f} to {max(values):.3f}")
    words = escape(f"Dice of {len(scores)} test cases. {'; '.join(told)}", quote=True)
    return (
        f'<figure class="spread"><svg role="img" aria-label="{words}" viewBox="0 0 410 {height}">'
        f"{''.join(lines + dots)}</svg><figcaption>Dice of test cases, a dot each; "
        f"bars: means. {escape('; '.join(told))}</figcaption></figure>"
    )


def load_segmentation(run: Run) -> SegmentationTask:
    """Return the network of a segmentation run as it was tested, weights alone, in evaluation mode.

    Raises:
        ValueError: if there is no checkpoint, or it is none of a segmentation of this version.
    """
    from agssd.run.checkpoints import read_checkpoint
    from agssd.tasks.encoders import load_encoder
    from agssd.tasks.segmentation import SegmentationTask

    path = _tested(run) or last_checkpoint(run)
    content = read_checkpoint(str(path))
    settings = {name: value for name, value in content["hyper_parameters"].items() if not name.startswith("_")}
    if "num_classes" not in settings or "crop_vox" not in settings:
        raise ValueError("the checkpoint is none of a segmentation")
    settings.pop("backbone", None)
    backbone = load_encoder(path)
    try:
        task = SegmentationTask(**settings | {"encoder": None, "backbone": backbone})
        task.load_state_dict(content["state_dict"])
    except (RuntimeError, TypeError) as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"the checkpoint does not fit the segmentation of this version of agssd: {said}") from error
    return task.eval()


def _tested(run: Run) -> Path | None:
    """Return the checkpoint that ``test.yaml`` names, where it still lies."""
    import yaml

    files = sorted(run.folder.glob("test*.yaml"), key=lambda path: path.stat().st_mtime_ns)
    named = (yaml.safe_load(files[-1].read_text(encoding="utf-8")) or {}).get("ckpt_path") if files else None
    path = Path(named) if isinstance(named, str) else None
    if path is not None and not path.is_file():
        path = run.folder / "checkpoints" / path.name  # the run was moved
    return path if path is not None and path.is_file() else None


def overlay_viewer(
    number: int, run: Run, name: str, score: Score, task: SegmentationTask, cache: VolumeCache, device: str
) -> str:
    """Return the viewer of one test case with label, prediction and errors.

    Raises:
        ValueError: if the cache does not hold the case, or has no label of it.
    """
    import torch

    from agssd.data_modules.probe_set import read_in_model_range
    from agssd.evaluation.metrics import dice_per_class

    row = next((row for row, info in enumerate(cache.cases) if info.key == score.key), None)
    if row is None or cache.cases[row].label_values is None:
        raise ValueError("the cache does not hold the tested cases with their labels; name theirs with --cache")
    info = cache.cases[row]
    image = read_in_model_range(cache, row, (0, 0, 0), info.shape)
    label = grouped(cache.read_whole(row, "label"), run.setting("data", "init_args", "label_groups"))
    with torch.no_grad():
        probabilities = task.to(device).segment(image[None].to(device))
    predicted = probabilities[0].argmax(0).cpu()
    again = dice_per_class(predicted, torch.from_numpy(label), task.num_classes).tolist()
    apart = max((abs(a - b) for a, b in zip(again, score.dice, strict=True) if not math.isnan(a + b)), default=0.0)
    factor = shrink_factors(info.shape, info.spatial_dims)
    layers = _layers(label, predicted.numpy(), factor)
    small = shrunk(image[0].numpy(), factor).astype(np.float32)
    body = shrunk(cache.read_whole(row, "foreground") != 0, factor, average=False)
    shown = shrunk(label, factor, average=False)
    places = np.nonzero(shown) if shown.any() else tuple(np.array([size // 2]) for size in shown.shape)
    start = tuple(min(int(np.median(found)), size - 1) for found, size in zip(places, small.shape, strict=True))
    d, h, w = (size * step for size, step in zip(info.spacing_mm, factor, strict=True))
    key = short_key(score.key)
    dice = ", ".join("absent" if math.isnan(value) else f"{value:.3f}" for value in score.dice)
    title = f"{name.capitalize()}: mean Dice {score.mean:.3f}{f' (case {key})' if key else ''}"
    note = f"<p>Dice by class: {dice}.</p>"
    if apart > _TOLERANCE:
        note += f'<p class="warning">The checkpoint is not the one that was tested: Dice differs by {apart:.3f}.</p>'
    place, flat = (start[0], start[1], start[2]), info.spatial_dims == 2
    return viewer(number, title, as_grey(small, body), (d, h, w), place, layers, 1, frames=flat) + note


def grouped(label: NDArray[Any], groups: Sequence[Sequence[int]] | None) -> NDArray[np.int64]:
    """Return stored labels as classes: as they are, or by groups, the rest background."""
    if groups is None:
        return label.astype(np.int64)
    classes = np.zeros(label.shape, np.int64)
    for index, values in enumerate(groups, 1):
        classes[np.isin(label, values)] = index
    return classes


def _layers(label: NDArray[Any], predicted: NDArray[Any], factor: Triple) -> list[Layer]:
    label, predicted = shrunk(label, factor, average=False), shrunk(predicted, factor, average=False)
    number = int(max(label.max(initial=0), predicted.max(initial=0)))
    legend = [(f"class {index}", css_colour(index)) for index in range(1, number + 1)]
    errors = np.zeros(label.shape, np.uint8)  # 1 missed, 2 added, 3 of another class
    errors[(label > 0) & (predicted == 0)] = 1
    errors[(label == 0) & (predicted > 0)] = 2
    errors[(label > 0) & (predicted > 0) & (label != predicted)] = 3
    told = [("missed", css_colour(1)), ("added", css_colour(2)), ("another class", css_colour(3))]
    return [
        Layer("label", "labels", label.astype(np.uint8), legend=legend),
        Layer("prediction", "labels", predicted.astype(np.uint8), legend=legend),
        Layer("errors", "labels", errors, legend=told),
        Layer("nothing"),
    ]


def metrics_table(figures: Mapping[str, float]) -> str:
    """Return the figures of a test as a table."""
    body = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td class=number>{value:.4f}</td></tr>"
        for name, value in figures.items()
        if "/" in name
    )
    return f"<table><tbody>{body}</tbody></table>" if body else ""
