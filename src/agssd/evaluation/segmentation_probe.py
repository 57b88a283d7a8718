"""Patch-level segmentation of frozen features, linear and by neighbours: what single tokens know of their voxels.

Linear: every token gets one linear map to the classes of each voxel of its patch, trained by a few hundred steps of
Adam on cross-entropy plus Dice; the weight decay is chosen on held-out training subjects. No neighbour, no convolution
and no interpolation takes part, which a UNETR readout cannot say of itself. Deterministic: zero start, order of
tokens from a seed. By neighbours: the label blocks of the most similar training tokens vote, voxel by voxel, so that a
token of several classes can be matched too; a block's majority label says nothing at large patches. Source: ours.

Measured on 145 hippocampus crops (patch 8, random encoder of size 192), mean Dice of one fold: rate 0.01 0.34, 0.1
0.46, 0.3 0.47 after 300 steps; 0.1 0.48 after 600; closed-form ridge regression on one-hot labels with thresholds
chosen by inner folds 0.33. Slow or squared-loss readouts measure their own convergence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from agssd.evaluation.folds import Fold, refuse_leak
from agssd.evaluation.neighbours import candidates, neighbours
from agssd.evaluation.probe_features import OUTSIDE

STEPS, BATCH_TOKENS, RATE = 300, 512, 0.2
_MAX_VOTES = 1 << 24  # at a time, 64 MiB
DECAYS = (0.0, 0.1)  # candidates of the weight decay; the first is taken where there is a single subject
Segmenter = Callable[[Tensor], Tensor]  # (N, E) tokens -> (N, P) int64 classes


class ProbeCase(NamedTuple):
    """Tokens of one volume and the labels under them."""

    subject: str
    tokens: Tensor  # (N, E) float32
    labels: Tensor  # (N, p_D * p_H * p_W) uint8, 255 outside the volume


class Readout(NamedTuple):
    """A fitted probe: scores of the foreground classes, background being 0."""

    weight: Tensor  # (E, (K - 1) * P) float32, classes outermost
    bias: Tensor  # ((K - 1) * P,) float32
    num_classes: int
    decay: float


def _quarter(cases: Sequence[ProbeCase]) -> tuple[list[ProbeCase], list[ProbeCase]]:
    """Return the cases of three quarters and of one quarter of the subjects, to choose settings by."""
    subjects = sorted({case.subject for case in cases})
    held_out = subjects[::4]  # names are hashes, so every fourth is as good as random
    return _by_subject(cases, [s for s in subjects if s not in set(held_out)]), _by_subject(cases, held_out)


def _by_subject(cases: Sequence[ProbeCase], subjects: Sequence[str]) -> list[ProbeCase]:
    chosen = set(subjects)
    return [case for case in cases if case.subject in chosen]


def objective_gradient(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient, to the scores, of cross-entropy plus 1 less the mean soft Dice of the foreground classes.

    Cross-entropy is a mean over voxels; Dice counts the voxels of all patches together, ``(2 overlap + 1) /
    (size + 1)`` of each class. Worked out in place and not by autograd, which takes twice as long over it (12 classes,
    512 tokens of 192, a step with its two products and its update: 37 against 74 ms; one thread of a 2-core x86-64 CPU,
    torch 2.13, 2026-11-23).

    Args:
        scores: (B, K - 1, P) float32 of the foreground classes, background being 0; overwritten.
        labels: (B, P) uint8, 255 outside the volume, where the gradient is 0.

    Returns:
        (B, K - 1, P) float32.
    """
    classes = scores.shape[1]
    inside = labels != OUTSIDE
    known = labels.long() * inside  # 0: background, or outside
    place = (known - 1).clamp_min_(0)[:, None]
    top = scores.amax(1, keepdim=True).clamp_min_(0.0)
    shares = scores.sub_(top).exp_()
    shares /= shares.sum(1, keepdim=True).add_(top.neg_().exp_())
    if not bool(inside.all()):
        shares *= inside[:, None]
    hit = shares.gather(1, place)[:, 0].mul_(known > 0)  # (B, P) share of the voxel's own class
    overlap = torch.bincount(known.flatten(), hit.flatten(), classes + 1)[1:].to(hit.dtype)
    size = shares.sum((0, 2)) + torch.bincount(known.flatten(), minlength=classes + 1)[1:]
    rise, fall = 2 / (size + 1) / classes, (2 * overlap + 1) / (size + 1).square() / classes  # of Dice, for a share
    each = 1 / inside.sum()
    gain = torch.cat([rise.new_zeros(1), rise]).take(known).mul_(hit)
    mean = torch.matmul(fall, shares).sub_(gain)  # (B, P) over the voxel's classes
    shares *= fall[:, None] + (each - mean)[:, None]
    return shares.scatter_add_(1, place, gain.add_(each).neg_().mul_(known > 0)[:, None])


def _with_background(scores: Tensor, num_classes: int) -> Tensor:
    """Return (N, K, P) scores with the background's 0 in front."""
    scores = scores.reshape(len(scores), num_classes - 1, -1)
    return torch.cat([torch.zeros_like(scores[:, :1]), scores], 1)


@torch.no_grad()
def _train(
    cases: Sequence[ProbeCase], num_classes: int, decay: float, steps: int, seed: int, device: torch.device
) -> Readout:
    tokens = torch.cat([case.tokens for case in cases]).to(device)
    labels = torch.cat([case.labels for case in cases]).to(device)
    mean, scale = tokens.mean(0), tokens.std(0, unbiased=False).clamp_min(1e-6)
    tokens = (tokens - mean) / scale
    outputs = (num_classes - 1) * labels.shape[1]
    weight = torch.zeros(tokens.shape[1], outputs, device=device)
    bias = torch.full((outputs,), -2.0, device=device)  # most voxels are background
    optimizer = torch.optim.AdamW(
        [{"params": [weight], "weight_decay": decay}, {"params": [bias], "weight_decay": 0.0}], lr=RATE
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    batch = min(BATCH_TOKENS, len(tokens))
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(tokens), generator=generator)
        chosen, order = order[:batch], order[batch:]
        chosen = chosen.to(device)
        shown = tokens[chosen]
        scores = (shown @ weight).add_(bias).reshape(batch, num_classes - 1, -1)
        gradient = objective_gradient(scores, labels[chosen]).reshape(batch, outputs)
        weight.grad, bias.grad = shown.T @ gradient, gradient.sum(0)
        optimizer.step()
        schedule.step()
    weight = weight / scale[:, None]
    return Readout(weight, bias - mean @ weight, num_classes, decay)


def mean_dice(segment: Segmenter, cases: Sequence[ProbeCase], num_classes: int) -> float:
    """Return the mean over classes of the mean Dice over the cases in which the class is, or is predicted."""
    scores = [case_dice(segment(case.tokens), case, num_classes) for case in cases]
    return float(torch.stack(scores).nanmean(0).nanmean())


def fit_readout(
    cases: Sequence[ProbeCase],
    num_classes: int,
    decays: Sequence[float] = DECAYS,
    steps: int = STEPS,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Readout:
    """Return the readout of labelled cases, its weight decay chosen on a quarter of their subjects.

    Each candidate is trained for half of the steps on the other subjects; the best mean Dice wins, the earlier
    candidate where they are equal, and is trained on all of them.

    Args:
        cases: training cases.
        num_classes: classes with background.
        decays: candidates of the weight decay; a single subject, or a single candidate, takes the first.
        steps: optimiser steps of the final readout.
        seed: of the order of tokens.
        device: where it is trained and applied.

    Raises:
        ValueError: if there are no cases.
    """
    if not cases:
        raise ValueError("the probe has no labelled training case")
    device = torch.device(device)
    learned, held_out = _quarter(cases)
    decay = decays[0]
    if learned and len(decays) > 1:
        best = -1.0
        for candidate in decays:
            readout = _train(learned, num_classes, candidate, max(1, steps // 2), seed, device)
            score = mean_dice(partial(predict_patches, readout), held_out, num_classes)
            if score > best + 1e-6:
                best, decay = score, candidate
    return _train(cases, num_classes, decay, steps, seed, device)


def predict_patches(readout: Readout, tokens: Tensor) -> Tensor:
    """Return classes (N, P) int64 of the voxels under tokens (N, E), on the CPU."""
    scores = tokens.to(readout.weight.device) @ readout.weight + readout.bias
    return _largest(_with_background(scores, readout.num_classes))


def _largest(scores: Tensor) -> Tensor:
    """Return the class (N, P) int64 of the largest of scores (N, K, P), the first where they are equal, on the CPU.

    Not argmax, which is ten times slower across this axis on a CPU (12 ms against 1.1 ms for 150 x 3 x 512; one thread
    of a 2-core x86-64 CPU, torch 2.13, 2026-11-21).
    """
    return scores.max(1).indices.cpu()


class NeighbourReadout:
    """Segments by the label blocks of the k most similar training tokens, k chosen on a quarter of the subjects.

    Each voxel of a patch takes the class with the most weight among the neighbours' voxels at the same place; voxels
    outside a training volume do not vote.

    Args:
        cases: training cases.
        num_classes: classes with background.
        device: where similarities are computed.
        counts: candidates of k; the smaller wins where two are equal. None takes those of
            :func:`agssd.evaluation.neighbours.candidates` for the number of tokens. A single subject takes the first.

    Raises:
        ValueError: if there are no cases.
    """

    def __init__(
        self,
        cases: Sequence[ProbeCase],
        num_classes: int,
        device: str | torch.device = "cpu",
        counts: Sequence[int] | None = None,
    ) -> None:
        if not cases:
            raise ValueError("the probe has no labelled training case")
        self.num_classes = num_classes
        self._tokens = torch.cat([case.tokens for case in cases]).to(device)
        self._labels = torch.cat([case.labels for case in cases]).to(device)
        self.k = self._choose(cases, device, counts or candidates(len(self._tokens)))

    def _choose(self, cases: Sequence[ProbeCase], device: str | torch.device, counts: Sequence[int]) -> int:
        learned, held_out = _quarter(cases)
        fit = [k for k in counts if k <= sum(len(case.tokens) for case in learned)]
        if not fit or len(counts) == 1:
            return counts[0]
        inner = NeighbourReadout(learned, self.num_classes, device, [max(fit)])
        by_k = [[*inner.predictions(case.tokens, fit)] for case in held_out]

        def score(index: int) -> float:
            scores = [case_dice(p[index], case, self.num_classes) for p, case in zip(by_k, held_out, strict=True)]
            return float(torch.stack(scores).nanmean(0).nanmean())

        return fit[max(range(len(fit)), key=score)]

    @torch.no_grad()
    def predictions(self, tokens: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Return classes (N, P) int64 of the voxels under tokens (N, E) for each rising k, on the CPU."""
        weights, rows = neighbours(tokens.to(self._tokens.device), self._tokens, counts[-1])
        classes = self.num_classes + 1  # with one for voxels outside, whose votes count for nobody
        chunk = max(1, _MAX_VOTES // (classes * self._labels.shape[1]))
        chunks = zip(weights.split(chunk), rows.split(chunk), strict=True)
        parts = [self._votes(*part, classes, counts) for part in chunks]
        return [torch.cat(found) for found in zip(*parts, strict=True)]

    def _votes(self, weights: Tensor, rows: Tensor, classes: int, counts: Sequence[int]) -> list[Tensor]:
        votes = weights.new_zeros(len(rows), classes, self._labels.shape[1])
        found = []
        for first, last in zip([0, *counts], counts, strict=False):
            for place in range(first, last):
                labels = self._labels[rows[:, place]].clamp_max(self.num_classes).long()[:, None]  # (n, 1, P)
                votes.scatter_add_(1, labels, weights[:, place, None, None].expand_as(labels))
            found.append(_largest(votes[:, :-1]))
        return found

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return classes (N, P) int64 of the voxels under tokens (N, E), on the CPU."""
        return self.predictions(tokens, [self.k])[0]


def case_dice(prediction: Tensor, case: ProbeCase, num_classes: int) -> Tensor:
    """Return Dice per foreground class (K - 1,) of predicted patches.

    A class absent from the labels is NaN, and left out of means, where it is not predicted, and 0 where it is.
    """
    inside = case.labels != OUTSIDE
    pairs = torch.bincount(
        prediction[inside] * num_classes + case.labels[inside].long(), minlength=num_classes**2
    ).reshape(num_classes, num_classes)
    sizes = pairs.sum(0) + pairs.sum(1)
    return (2 * pairs.diagonal() / sizes)[1:].float()  # 0 / 0 is NaN


def probe_segmentation(
    cases: Sequence[ProbeCase],
    folds: Sequence[Fold],
    num_classes: int,
    fit: Callable[[Sequence[ProbeCase], int], Segmenter],
) -> dict[str, np.ndarray]:
    """Return the out-of-fold Dice of every held-out subject.

    Args:
        cases: labelled cases with their tokens.
        folds: who is learnt from, who is predicted.
        num_classes: classes with background.
        fit: makes the segmenter of a fold from its training cases and ``num_classes``.

    Returns:
        subject -> (K - 1,) float64 Dice per class, the mean over the subject's cases; a case without the class is left
        out where it is not predicted and counts 0 where it is; NaN where no case counts.

    Raises:
        ValueError: if a subject to learn from is in the fold that is predicted.
    """
    found: dict[str, np.ndarray] = {}
    for number, fold in enumerate(folds):
        refuse_leak(fold, number)
        segment = fit(_by_subject(cases, fold.learned), num_classes)
        for subject in fold.held_out:
            own = _by_subject(cases, [subject])
            if own:
                scores = torch.stack([case_dice(segment(case.tokens), case, num_classes) for case in own])
                found[subject] = scores.double().nanmean(0).numpy()
    return found


def linear_segmenter(
    cases: Sequence[ProbeCase], num_classes: int, steps: int = STEPS, device: str | torch.device = "cpu"
) -> Segmenter:
    """Return the linear readout of :func:`fit_readout` as a function of tokens."""
    return partial(predict_patches, fit_readout(cases, num_classes, steps=steps, device=device))
