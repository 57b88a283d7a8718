"""Patch-token linear segmentation of frozen features: what single tokens know about the voxels under them.

Every token gets one linear map to the classes of each voxel of its patch. It is fitted by ridge regression on one-hot
labels in closed form, so it is deterministic, needs no learning rate and takes seconds; the ridge and one threshold per
class (rare classes need less than one half) are chosen by inner folds over the training subjects. No neighbour, no
convolution and no interpolation takes part, which a UNETR readout cannot say of itself. Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from agssd.models.backbone import Backbone
from agssd.types import Triple

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the correlation matrix, whose diagonal is 1
DEFAULT_PENALTY, DEFAULT_THRESHOLD = 1e-2, 0.3  # where a single subject leaves nothing to choose by
_BINS = 100  # thresholds are multiples of 1 / _BINS
_OUTSIDE = 255


class ProbeCase(NamedTuple):
    """Tokens of one volume and the labels under them."""

    subject: str
    tokens: Tensor  # (N, E) float32
    labels: Tensor  # (N, p_D * p_H * p_W) uint8, 255 outside the volume


class Readout(NamedTuple):
    """A fitted probe."""

    weight: Tensor  # (E, (K - 1) * P) float32, classes outermost
    bias: Tensor  # ((K - 1) * P,) float32
    thresholds: Tensor  # (K - 1,) float32
    penalty: float


def _padded_shape(shape: Sequence[int], patch_size: Triple, window_vox: Triple) -> Triple:
    sizes = [max(-(-n // p) * p, w) for n, p, w in zip(shape, patch_size, window_vox, strict=True)]
    return (sizes[0], sizes[1], sizes[2])


def _starts(length: int, window: int, stride: int) -> list[int]:
    last = length - window
    return [*range(0, last, stride), last]


@torch.no_grad()
def window_tokens(
    backbone: Backbone, image: Tensor, window_vox: Triple, overlap: float = 0.5, batch_size: int = 16
) -> Tensor:
    """Return the tokens of a whole volume, each the mean over the windows that contain it.

    Args:
        backbone: frozen encoder in evaluation mode.
        image: (C, D, H, W) float32 in the model's range; padded at the end with its lowest value to whole patches.
        window_vox: window in voxels, a multiple of the patch: the size of view the encoder was trained on.
        overlap: of neighbouring windows, in [0, 1); rounded so that windows start on patch borders.
        batch_size: windows per forward pass.

    Returns:
        (N, E) float32 in raster order of the padded volume's patches, on the CPU.

    Raises:
        ValueError: if the window is no multiple of the patch or the overlap is out of range.
    """
    patch = backbone.patch_size
    if any(w < p or w % p for w, p in zip(window_vox, patch, strict=True)):
        raise ValueError(f"window {tuple(window_vox)} is no multiple of the encoder's patch {tuple(patch)}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}; give a share from 0 to below 1")
    size = _padded_shape(image.shape[1:], patch, window_vox)
    pads = [n for axis in (2, 1, 0) for n in (0, size[axis] - image.shape[axis + 1])]
    padded = F.pad(image, pads, value=float(image.min()))
    strides = [max(1, round((1 - overlap) * w / p)) * p for w, p in zip(window_vox, patch, strict=True)]
    axes = [_starts(n, w, s) for n, w, s in zip(size, window_vox, strides, strict=True)]
    places = [(d, h, w) for d in axes[0] for h in axes[1] for w in axes[2]]
    grid = [n // p for n, p in zip(size, patch, strict=True)]
    total = torch.zeros(*grid, backbone.embed_dim)
    count = torch.zeros(*grid, 1)
    d, h, w = (n // p for n, p in zip(window_vox, patch, strict=True))
    device = next(backbone.parameters()).device
    for first in range(0, len(places), batch_size):
        chosen = places[first : first + batch_size]
        views = [
            padded[:, a : a + window_vox[0], b : b + window_vox[1], c : c + window_vox[2]] for a, b, c in chosen
        ]
        tokens = backbone(torch.stack(views).to(device)).tokens.float().cpu()
        for (a, b, c), view in zip(chosen, tokens, strict=True):
            i, j, k = a // patch[0], b // patch[1], c // patch[2]
            total[i : i + d, j : j + h, k : k + w] += view.reshape(d, h, w, -1)
            count[i : i + d, j : j + h, k : k + w] += 1
    return (total / count).reshape(-1, backbone.embed_dim)


def patch_labels(label: Tensor, patch_size: Triple, window_vox: Triple) -> Tensor:
    """Return the labels under the tokens of :func:`window_tokens`.

    Args:
        label: (D, H, W) integers below 255.
        patch_size: voxels per token.
        window_vox: window of the features, which decides the padding.

    Returns:
        (N, p_D * p_H * p_W) uint8 in raster order, 255 outside the volume.
    """
    size = _padded_shape(label.shape, patch_size, window_vox)
    pads = [n for axis in (2, 1, 0) for n in (0, size[axis] - label.shape[axis])]
    padded = F.pad(label.to(torch.uint8), pads, value=_OUTSIDE)
    d, h, w = (n // p for n, p in zip(size, patch_size, strict=True))
    p_d, p_h, p_w = patch_size
    blocks = padded.reshape(d, p_d, h, p_h, w, p_w).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(d * h * w, p_d * p_h * p_w)


class _Moments(NamedTuple):
    """Sums from which every ridge solution over a set of cases follows."""

    count: float
    inputs: Tensor  # (E,) float64
    targets: Tensor  # (Q,) float64
    squares: Tensor  # (E, E) float64
    products: Tensor  # (E, Q) float64


def _merge(parts: Sequence[_Moments]) -> _Moments:
    """Return the sums over all parts."""
    return _Moments(
        sum(part.count for part in parts),
        torch.stack([part.inputs for part in parts]).sum(0),
        torch.stack([part.targets for part in parts]).sum(0),
        torch.stack([part.squares for part in parts]).sum(0),
        torch.stack([part.products for part in parts]).sum(0),
    )


def _moments(cases: Sequence[ProbeCase], num_classes: int) -> _Moments:
    tokens = torch.cat([case.tokens for case in cases])  # (N, E)
    labels = torch.cat([case.labels for case in cases])  # (N, P)
    products, targets = [], []
    for index in range(1, num_classes):
        one_hot = (labels == index).float()
        products.append((tokens.T @ one_hot).double())
        targets.append(one_hot.sum(0).double())
    exact = tokens.double()
    return _Moments(
        float(len(tokens)), exact.sum(0), torch.cat(targets), exact.T @ exact, torch.cat(products, 1)
    )


def _solve(moments: _Moments, penalties: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    """Return (weight, bias) of the ridge regression on standardised tokens, for each penalty."""
    mean = moments.inputs / moments.count
    covariance = moments.squares / moments.count - torch.outer(mean, mean)
    scale = covariance.diagonal().clamp_min(1e-12).sqrt()
    target_mean = moments.targets / moments.count
    cross = (moments.products / moments.count - torch.outer(mean, target_mean)) / scale[:, None]
    values, vectors = torch.linalg.eigh(covariance / torch.outer(scale, scale))
    rotated = vectors.T @ cross
    solutions = []
    for penalty in penalties:
        weight = vectors @ (rotated / (values.clamp_min(0) + penalty)[:, None]) / scale[:, None]
        solutions.append((weight.float(), (target_mean - mean @ weight).float()))
    return solutions


def _threshold_dice(case: ProbeCase, weight: Tensor, bias: Tensor, num_classes: int) -> Tensor:
    """Return Dice of each class against the rest at every threshold, (K - 1, _BINS), NaN without the class."""
    scores = (case.tokens @ weight + bias).reshape(len(case.tokens), num_classes - 1, -1)
    bins = (scores * _BINS).floor().clamp(0, _BINS - 1).long()  # predicted at threshold t / _BINS iff bins >= t
    inside = case.labels != _OUTSIDE
    dice = torch.full((num_classes - 1, _BINS), float("nan"))
    for index in range(1, num_classes):
        truth = case.labels == index
        if not truth.any():
            continue
        column = bins[:, index - 1]
        predicted = torch.bincount(column[inside], minlength=_BINS).flip(0).cumsum(0).flip(0).double()
        hit = torch.bincount(column[truth], minlength=_BINS).flip(0).cumsum(0).flip(0).double()
        dice[index - 1] = (2 * hit / (predicted + truth.sum())).float()
    return dice


def _by_subject(cases: Sequence[ProbeCase], subjects: Sequence[str]) -> list[ProbeCase]:
    chosen = set(subjects)
    return [case for case in cases if case.subject in chosen]


def fit_readout(
    cases: Sequence[ProbeCase],
    num_classes: int,
    penalties: Sequence[float] = PENALTIES,
    inner_folds: int = 3,
) -> Readout:
    """Return the ridge readout of labelled cases, ridge and thresholds chosen by inner folds over their subjects.

    Args:
        cases: training cases.
        num_classes: classes with background.
        penalties: candidates of the ridge, relative to the correlation matrix.
        inner_folds: number of inner folds, at most the number of subjects; a single subject takes the defaults.

    Raises:
        ValueError: if there are no cases.
    """
    subjects = sorted({case.subject for case in cases})
    if not subjects:
        raise ValueError("the probe has no labelled training case")
    folds = [subjects[i :: min(inner_folds, len(subjects))] for i in range(min(inner_folds, len(subjects)))]
    parts = [_moments(_by_subject(cases, fold), num_classes) for fold in folds]
    penalty, thresholds = DEFAULT_PENALTY, torch.full((num_classes - 1,), DEFAULT_THRESHOLD)
    if len(folds) > 1:
        curves: list[list[Tensor]] = [[] for _ in penalties]
        for held_out, fold in enumerate(folds):
            rest = [part for index, part in enumerate(parts) if index != held_out]
            for index, (weight, bias) in enumerate(_solve(_merge(rest), penalties)):
                curves[index] += [_threshold_dice(c, weight, bias, num_classes) for c in _by_subject(cases, fold)]
        means = torch.stack([torch.stack(curve).nanmean(0).nan_to_num(0.0) for curve in curves])  # (L, K - 1, _BINS)
        means[:, :, 0] = 0.0  # a threshold of 0 predicts every voxel
        best = int(means.amax(2).mean(1).argmax())
        penalty = float(penalties[best])
        thresholds = means[best].argmax(1) / _BINS
    weight, bias = _solve(_merge(parts), [penalty])[0]
    return Readout(weight, bias, thresholds, penalty)


def predict_patches(readout: Readout, tokens: Tensor) -> Tensor:
    """Return classes (N, P) int64 of the voxels under tokens (N, E): the class furthest above its threshold, else 0."""
    scores = (tokens @ readout.weight + readout.bias).reshape(len(tokens), len(readout.thresholds), -1)
    margin, index = (scores - readout.thresholds[:, None]).max(1)
    return torch.where(margin >= 0, index + 1, torch.zeros_like(index))


def case_dice(prediction: Tensor, case: ProbeCase, num_classes: int) -> Tensor:
    """Return Dice per foreground class (K - 1,) of predicted patches, NaN for a class in neither map."""
    inside = case.labels != _OUTSIDE
    pairs = torch.bincount(
        prediction[inside] * num_classes + case.labels[inside].long(), minlength=num_classes**2
    ).reshape(num_classes, num_classes)
    sizes = pairs.sum(0) + pairs.sum(1)
    return (2 * pairs.diagonal() / sizes)[1:].float()  # 0 / 0 is NaN


def probe_segmentation(
    cases: Sequence[ProbeCase],
    folds: Sequence[Sequence[str]],
    num_classes: int,
    train_subjects: Sequence[Sequence[str]] | None = None,
) -> dict[str, np.ndarray]:
    """Return the out-of-fold Dice of every subject.

    Args:
        cases: labelled cases with their tokens.
        folds: disjoint lists of subjects; each is predicted by a readout fitted on the others.
        num_classes: classes with background.
        train_subjects: for each fold the subjects to learn from (few labels); None takes all of the other folds.

    Returns:
        subject -> (K - 1,) float64 Dice per class, the mean over the subject's cases, NaN for a class it does not have.

    Raises:
        ValueError: if a subject to learn from is in the fold that is predicted.
    """
    found: dict[str, np.ndarray] = {}
    for index, fold in enumerate(folds):
        others = [subject for other, names in enumerate(folds) if other != index for subject in names]
        learned = others if train_subjects is None else list(train_subjects[index])
        if set(learned) & set(fold):
            raise ValueError(f"fold {index} would be predicted by a readout that has seen {set(learned) & set(fold)}")
        readout = fit_readout(_by_subject(cases, learned), num_classes)
        for subject in fold:
            scores = torch.stack(
                [
                    case_dice(predict_patches(readout, case.tokens), case, num_classes)
                    for case in _by_subject(cases, [subject])
                ]
            )
            found[subject] = scores.double().nanmean(0).numpy()
    return found
