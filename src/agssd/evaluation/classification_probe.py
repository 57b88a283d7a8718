"""Classification of volumes by frozen features: weighted neighbours and logistic regression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from agssd.evaluation.folds import Fold, refuse_leak
from agssd.evaluation.logistic import choose_strength, fit_logistic
from agssd.evaluation.metrics import classification_scores
from agssd.evaluation.neighbours import candidates, neighbours, vote


class ProbeVector(NamedTuple):
    """The feature of one volume and its class."""

    subject: str
    feature: Tensor  # (E,) float32
    target: int


def _stacked(cases: Sequence[ProbeVector]) -> tuple[Tensor, Tensor]:
    unit = F.normalize(torch.stack([case.feature for case in cases]).float(), dim=-1)
    return unit, torch.tensor([case.target for case in cases])


def neighbour_shares(learned: Sequence[ProbeVector], asked: Sequence[ProbeVector], num_classes: int) -> Tensor:
    """Return (n, num_classes) float32 shares of the votes, k chosen among the ``learned`` alone.

    k is the candidate of the best balanced accuracy when each learned volume is classified by those of other subjects;
    the smaller one where two are equal. Source: docs/method.md (d). Deviates: k by leave-one-subject-out instead of on
    a validation set, which few labels do not leave.
    """
    features, targets = _stacked(learned)
    names = [case.subject for case in learned]
    same = torch.tensor([[one == other for other in names] for one in names])
    counts = candidates(len(learned))
    weights, rows = neighbours(features, features, max(counts), same)

    def accuracy(k: int) -> float:
        return classification_scores(vote(weights[:, :k], targets[rows[:, :k]], num_classes), targets)[
            "balanced_accuracy"
        ]

    k = max(counts, key=accuracy)  # the first of the best
    weights, rows = neighbours(_stacked(asked)[0], features, k)
    return vote(weights, targets[rows], num_classes)


def linear_shares(learned: Sequence[ProbeVector], asked: Sequence[ProbeVector], num_classes: int) -> Tensor:
    """Return (n, num_classes) float32 probabilities of a logistic regression, its strength chosen among ``learned``.

    Features are standardised by the learned volumes. Source: docs/method.md (d). Deviates: 12 strengths instead of 45.
    """
    features, targets = (tensor.numpy() for tensor in _stacked(learned))
    mean, scale = features.mean(0), features.std(0).clip(1e-6)
    inputs = ((features - mean) / scale).astype(np.float64)
    strength = choose_strength(inputs, targets, [case.subject for case in learned], num_classes)
    fitted = fit_logistic(inputs, targets, num_classes, strength)
    queries = ((_stacked(asked)[0].numpy() - mean) / scale).astype(np.float64)
    return torch.from_numpy(fitted.probabilities(queries)).float()


SHARES = {"knn": neighbour_shares, "linear": linear_shares}


def probe_classification(
    cases: Sequence[ProbeVector], folds: Sequence[Fold], num_classes: int, kind: Literal["knn", "linear"]
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return scores over all held-out volumes, and per subject the share that is right.

    Args:
        cases: volumes with their features and classes.
        folds: who is learnt from, who is predicted.
        num_classes: K.
        kind: weighted neighbours or logistic regression.

    Returns:
        ``auroc`` and ``balanced_accuracy`` of :func:`agssd.evaluation.metrics.classification_scores`; and subject ->
        (1,) float64 accuracy.

    Raises:
        ValueError: if a fold would be predicted by what it was learnt from, or has nothing to learn from.
    """
    shares, targets, right = [], [], {}
    for number, fold in enumerate(folds):
        refuse_leak(fold, number)
        learned = [case for case in cases if case.subject in set(fold.learned)]
        asked = [case for case in cases if case.subject in set(fold.held_out)]
        if not learned or not asked:
            raise ValueError(f"fold {number} of the probe has no volume with a class to learn from or to predict")
        found = SHARES[kind](learned, asked, num_classes)
        shares.append(found)
        targets += [case.target for case in asked]
        hits = [float(guess == case.target) for guess, case in zip(found.argmax(1).tolist(), asked, strict=True)]
        for subject in fold.held_out:
            own = [hit for hit, case in zip(hits, asked, strict=True) if case.subject == subject]
            if own:
                right[subject] = np.array([np.mean(own)])
    return classification_scores(torch.cat(shares), torch.tensor(targets)), right
