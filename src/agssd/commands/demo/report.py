"""The demo's table and pictures, from what the runs wrote."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from agssd.scans.simulated.heads import LABEL_NAMES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agssd.commands.demo import Size

ROWS = {"random": "from random weights", "pretrained": "pretrained by AG-SSD"}
_WINDOW = 0.1  # share of the steps that makes up "start" and "end" of a loss


def collect(folder: Path) -> dict[str, list[float]]:
    """Return Dice per test subject: for "grey matter", "white matter" and their "mean", in order of the cases.

    Raises:
        ValueError: if the run below ``folder`` wrote no ``test_cases.csv``.
    """
    with _newest(folder, "test_cases.csv").open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["case"])
    names = LABEL_NAMES[1:]
    found = {name: [float(row[f"dice_class{index}"]) for row in rows] for index, name in enumerate(names, 1)}
    found["mean"] = [mean(values) for values in zip(*found.values(), strict=True)]
    return found


def losses(folder: Path) -> dict[str, tuple[float, float]]:
    """Return for every loss of the pretraining run its mean over the first and over the last tenth of the steps."""
    with _newest(folder, "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for name in rows[0]:
        values = [float(row[name]) for row in rows if row[name]]
        if name.startswith("train/loss") and values:
            window = max(1, round(_WINDOW * len(values)))
            found[name.removeprefix("train/")] = (mean(values[:window]), mean(values[-window:]))
    return found


def frozen(path: Path) -> dict[str, tuple[float, float]]:
    """Return the mean Dice of a linear layer and of k-NN by encoder, from what ``agssd probe`` wrote."""
    readouts = json.loads(path.read_text())["readouts"]
    linear, neighbours = (readouts[name]["score"] for name in ("linear-seg", "knn-seg"))
    return {name: (linear[name]["mean"], neighbours[name]["mean"]) for name in ROWS}


def write_table(
    path: Path, results: Mapping[str, dict[str, list[float]]], out: Path, size: Size, notice: str, quick: bool
) -> str:
    """Write the report as Markdown and return it.

    Args:
        path: of the report.
        results: Dice of the test subjects after fine-tuning, by encoder and class.
        out: folder of the demo, with ``frozen.json`` and the pretraining.
        size: of the demo.
        notice: what the figures say and do not.
        quick: say that this was the short form.
    """
    heads = [*LABEL_NAMES[1:], "mean"]
    lines = [
        f"Segmentation of {size.subjects['val']} held-out subjects from frozen tokens, {size.num_labelled} labelled "
        "subjects (Dice):",
        "",
        "| encoder                | linear layer |         k-NN |",
        "|------------------------|-------------:|-------------:|",
    ]
    tokens = frozen(out / "frozen.json")
    lines += [f"| {title:<22} | {tokens[name][0]:>12.3f} | {tokens[name][1]:>12.3f} |" for name, title in ROWS.items()]
    lines += [
        "",
        f"Segmentation of {size.subjects['test']} test subjects after fine-tuning on {size.num_labelled} labelled "
        f"subjects for {size.finetune_steps} steps (Dice):",
        "",
        f"| {'encoder':<22} | " + " | ".join(f"{head:>12}" for head in heads) + " |",
        f"|{'-' * 24}|" + "|".join(f"{'-' * 13}:" for _ in heads) + "|",
    ]
    for name, title in ROWS.items():
        lines.append(f"| {title:<22} | " + " | ".join(f"{mean(results[name][head]):>12.3f}" for head in heads) + " |")
    pairs = zip(results["pretrained"]["mean"], results["random"]["mean"], strict=True)
    differences = [ours - theirs for ours, theirs in pairs]
    better = sum(difference > 0 for difference in differences)
    lines += [
        "",
        f"Difference per subject: {mean(differences):+.3f} on average ({min(differences):+.3f} to "
        f"{max(differences):+.3f}), pretrained better in {better} of {len(differences)}; one draw of labels, one seed.",
        "",
        f"Pretraining, {size.pretrain_steps} steps on {size.subjects['train']} subjects without labels, mean of the "
        "first and of the last tenth:",
        "",
        "| term                   |        first |         last |",
        "|------------------------|-------------:|-------------:|",
    ]
    lines += [
        f"| {name:<22} | {first:>12.3f} | {last:>12.3f} |" for name, (first, last) in losses(out / "pretrain").items()
    ]
    if quick:
        lines += ["", "The short form runs every step but is too short to learn: do not read the figures."]
    text = "\n".join(lines)
    path.write_text(f"# What the demo measured\n\n{notice}\n\n{text}\n")
    return text


def write_pictures(out: Path) -> list[Path]:
    """Write the pictures into ``out`` and return their paths: the last view panel, and a segmentation overlay."""
    panels = sorted((out / "pretrain").rglob("*.png"), key=lambda path: path.stat().st_mtime_ns)
    made = []
    if panels:
        made.append(Path(shutil.copyfile(panels[-1], out / "views.png")))
    made.append(_overlay(out, out / "segmentation.png"))
    return made


def _overlay(out: Path, path: Path) -> Path:
    """Draw one test subject: image, labels, and what both networks found, in the middle axial and coronal planes."""
    import nibabel as nib
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    predictions = {name: _newest(out / name, "*.nii.gz") for name in ROWS}
    subject = _file_of(predictions["random"], out / "keys.csv")

    def load(file: Path) -> Any:
        image: Any = nib.load(file)
        return np.asanyarray(image.dataobj)

    image = load(out / "scans" / "images" / subject)
    maps = {"truth": load(out / "scans" / "labels" / subject)}
    maps |= {ROWS[name]: load(file) for name, file in predictions.items()}
    colours = ListedColormap(["#2a9d8f", "#e9c46a"])
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 4, squeeze=False)
    for row, axis in enumerate((2, 1)):  # axial, coronal
        at = [slice(None)] * 3
        at[axis] = image.shape[axis] // 2
        plane = image[tuple(at)].T
        for column, title in enumerate(["image", *maps]):
            panel = axes[row][column]
            panel.imshow(plane, cmap="gray", origin="lower")
            if column:
                found = maps[title][tuple(at)].T
                panel.imshow(np.ma.masked_equal(found, 0), cmap=colours, vmin=1, vmax=2, alpha=0.6, origin="lower")
            panel.set_axis_off()
            if row == 0:
                panel.set_title(title, fontsize=10)
    figure.suptitle("A simulated test subject; green: grey matter, yellow: white matter", fontsize=10)
    figure.savefig(path, dpi=90)
    return path


def _file_of(prediction: Path, key_map: Path) -> str:
    """Return the file name of the image to which a prediction, named by the key of its case, belongs."""
    with key_map.open(newline="") as file:
        names = {row["key"]: Path(row["path"]).name for row in csv.DictReader(file)}
    return names[prediction.name.removesuffix(".nii.gz")]


def _newest(folder: Path, pattern: str) -> Path:
    files = sorted(folder.rglob(pattern), key=lambda path: path.stat().st_mtime_ns)
    if not files:
        raise ValueError(f"{folder}: the run wrote no {pattern}")
    return files[-1]
