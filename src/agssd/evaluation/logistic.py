"""Multinomial logistic regression of few samples and many features, solved to convergence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
STRENGTHS = tuple(10.0**power for power in range(-6, 6))
_ITERATIONS = 1000


class Logistic(NamedTuple):
    """Class scores ``x @ weight + bias`` of features x."""

    weight: Array  # (E, K)
    bias: Array  # (K,)

    def probabilities(self, features: Array) -> Array:
        """Return (n, K) of features (n, E)."""
        return _softmax(features @ self.weight + self.bias)


def _softmax(scores: Array) -> Array:
    shares: Array = np.exp(scores - scores.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    return shares


def fit_logistic(features: Array, targets: NDArray[np.int64], num_classes: int, strength: float) -> Logistic:
    """Return the minimiser of ``strength * sum of cross-entropies + |weight|^2 / 2`` by L-BFGS.

    Solved in the space that the samples span, where the solution lies, so that many features cost nothing. The bias is
    not penalised; its sum over classes, which changes nothing, is 0. Source: docs/method.md (d).

    Args:
        features: (n, E).
        targets: (n,) below ``num_classes``.
        num_classes: K.
        strength: C of scikit-learn.
    """
    from scipy.optimize import minimize

    left, values, right = np.linalg.svd(features.astype(np.float64), full_matrices=False)
    kept = values > values.max(initial=0.0) * 1e-12
    inputs, basis = left[:, kept] * values[kept], right[kept]
    num, rank = inputs.shape
    truth = np.eye(num_classes)[targets]

    def objective(flat: Array) -> tuple[float, Array]:
        weight, bias = flat[: rank * num_classes].reshape(rank, num_classes), flat[rank * num_classes :]
        scores = inputs @ weight + bias
        top = scores.max(1, keepdims=True)
        logs = top + np.log(np.exp(scores - top).sum(1, keepdims=True))
        excess = strength * (np.exp(scores - logs) - truth)
        loss = strength * float((logs[:, 0] - scores[np.arange(num), targets]).sum()) + float((weight**2).sum()) / 2
        return loss, np.concatenate([(inputs.T @ excess + weight).ravel(), excess.sum(0)])

    start = np.zeros((rank + 1) * num_classes)
    options = {"maxiter": _ITERATIONS, "maxcor": 20, "ftol": 1e-13, "gtol": 1e-7 * max(1.0, strength)}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x
    bias = found[rank * num_classes :]
    return Logistic(basis.T @ found[: rank * num_classes].reshape(rank, num_classes), bias - bias.mean())


def choose_strength(
    features: Array,
    targets: NDArray[np.int64],
    subjects: Sequence[str],
    num_classes: int,
    strengths: Sequence[float] = STRENGTHS,
    num_folds: int = 3,
) -> float:
    """Return the strength with the smallest cross-entropy on inner folds by subject; 1 for fewer subjects than folds.

    Args:
        features: (n, E) of the training samples.
        targets: (n,).
        subjects: of each sample.
        num_classes: K.
        strengths: candidates; the earlier, stronger penalty wins where two are equal.
        num_folds: inner folds.
    """
    names = sorted(set(subjects))
    if len(names) < num_folds:
        return 1.0
    fold_of = {name: number % num_folds for number, name in enumerate(names)}
    folds = np.array([fold_of[subject] for subject in subjects])

    def loss(strength: float) -> float:
        total = 0.0
        for fold in range(num_folds):
            held, rest = folds == fold, folds != fold
            fitted = fit_logistic(features[rest], targets[rest], num_classes, strength)
            shares = fitted.probabilities(features[held])[np.arange(int(held.sum())), targets[held]]
            total -= float(np.log(shares.clip(1e-12)).sum())
        return total

    return min(strengths, key=loss)
