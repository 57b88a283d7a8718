"""Segmentation overlap and surface agreement per case; classification scores over a set of cases.

Segmentation scores are one figure per class and case, NaN where the class is in neither map. A mean over the finite
values leaves out a class that is absent and not predicted; one that is absent and predicted counts 0. Everything in mm
takes the spacing of the grid it is measured on.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def _one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Return (1, num_classes, D, H, W) float32 of an integer map (D, H, W)."""
    return F.one_hot(labels.long(), num_classes).movedim(-1, 0)[None].float()


def _check_maps(prediction: Tensor, label: Tensor, num_classes: int) -> None:
    if prediction.shape != label.shape or prediction.ndim not in (2, 3):
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and label {tuple(label.shape)} must be maps ([D,] H, W) of one shape"
        )
    for name, values in (("prediction", prediction), ("label", label)):
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= num_classes:
            raise ValueError(f"{name} holds values {low} to {high}, but num_classes={num_classes} allows 0 to "
                             f"{num_classes - 1}; raise num_classes or relabel")  # fmt: skip


def dice_per_class(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Return the Dice overlap of each foreground class.

    Args:
        prediction: (D, H, W) integer class map.
        label: (D, H, W) integer class map, the reference.
        num_classes: classes with background; class 0 is left out of the answer.

    Returns:
        (num_classes - 1,) float32: 1 where the maps agree, 0 where a class is in only one of them, NaN where a class
        is in neither.

    Raises:
        ValueError: if the shapes differ or a value is not a class.

    Source: MONAI ``compute_dice``. Deviates: NaN only for a class absent from both maps; MONAI either counts that as
    1 or also drops false positives of classes absent from the label.
    """
    from monai.metrics import compute_dice

    _check_maps(prediction, label, num_classes)
    scores: Tensor = compute_dice(
        _one_hot(prediction, num_classes), _one_hot(label, num_classes), include_background=False, ignore_empty=False
    )[0]
    classes = torch.arange(1, num_classes, device=label.device)
    absent = ~torch.isin(classes, prediction.unique()) & ~torch.isin(classes, label.unique())
    return scores.float().masked_fill(absent, float("nan"))


def surface_dice_per_class(
    prediction: Tensor, label: Tensor, num_classes: int, spacing_mm: Sequence[float], tolerance_mm: float = 1.0
) -> Tensor:
    """Return the normalised surface distance of each foreground class: the share of both surfaces within tolerance.

    Args:
        prediction: (D, H, W) integer class map, or (T, H, W) of frames, whose outlines are compared frame by frame.
        label: integer class map of the same shape, the reference.
        num_classes: classes with background; class 0 is left out of the answer.
        spacing_mm: voxel size per axis of the maps, tensor order; two numbers for frames.
        tolerance_mm: distance up to which two surfaces count as the same.

    Returns:
        (num_classes - 1,) float32 in [0, 1], NaN where a class is in neither map; of frames the mean over those that
        hold it in either map.

    Raises:
        ValueError: if the shapes differ, a value is not a class, or the tolerance is negative.

    Source: MONAI ``compute_surface_dice`` (Nikolov et al. 2018), class by class to keep memory flat.
    """
    from monai.metrics import compute_surface_dice

    _check_maps(prediction, label, num_classes)
    if tolerance_mm < 0:
        raise ValueError(f"tolerance_mm is {tolerance_mm}; a distance cannot be negative")
    if prediction.ndim > len(spacing_mm):
        frames = zip(prediction, label, strict=True)
        return mean_over_present(
            torch.stack([surface_dice_per_class(*both, num_classes, spacing_mm, tolerance_mm) for both in frames]), 0
        )
    scores = torch.full((num_classes - 1,), float("nan"))
    for index in range(1, num_classes):
        pair = torch.stack([prediction == index, label == index]).cpu()
        if not pair.any():
            continue
        if not pair[0].any() or not pair[1].any():
            scores[index - 1] = 0.0
            continue
        first, second = (torch.stack([~one, one])[None].float() for one in pair)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.6 calls its own deprecated argument
            scores[index - 1] = compute_surface_dice(
                first, second, class_thresholds=[tolerance_mm], spacing=[float(s) for s in spacing_mm]
            )[0, 0]
    return scores


def mean_over_present(scores: Tensor, dim: int | None = None) -> Tensor:
    """Return the mean over finite entries, NaN where there is none."""
    return scores.float().nanmean() if dim is None else scores.float().nanmean(dim)


def classification_scores(probabilities: Tensor, targets: Tensor) -> dict[str, float]:
    """Return ``auroc`` (one against rest, macro) and ``balanced_accuracy`` (mean recall).

    Args:
        probabilities: (N, classes) float32, rows summing to 1.
        targets: (N,) int64.

    Returns:
        Both figures, over the classes that occur in ``targets``; AUROC also needs another class to occur, else NaN.

    Raises:
        ValueError: if the shapes do not fit or a target is not a class.

    Source: torchmetrics. Deviates: classes that do not occur are left out instead of scored 0.
    """
    from torchmetrics.functional.classification import binary_auroc, multiclass_recall

    if probabilities.ndim != 2 or targets.shape != probabilities.shape[:1] or not len(targets):
        raise ValueError(f"probabilities {tuple(probabilities.shape)} and targets {tuple(targets.shape)} do not fit")
    classes = probabilities.shape[1]
    if int(targets.min()) < 0 or int(targets.max()) >= classes:
        raise ValueError(
            f"targets hold {int(targets.min())} to {int(targets.max())}, but there are {classes} classes; "
            "raise num_classes or relabel"
        )
    probabilities, targets = probabilities.detach().float().cpu(), targets.cpu()
    counts = torch.bincount(targets, minlength=classes)
    present = [index for index in range(classes) if 0 < int(counts[index])]
    if classes == 2:
        present_auroc = [1] if len(present) == 2 else []
    else:
        present_auroc = [index for index in present if int(counts[index]) < len(targets)]
    areas = [float(binary_auroc(probabilities[:, index], (targets == index).long())) for index in present_auroc]
    recall = multiclass_recall(probabilities.argmax(1), targets, num_classes=classes, average="none")
    return {
        "auroc": sum(areas) / len(areas) if areas else float("nan"),
        "balanced_accuracy": float(recall[present].mean()),
    }
