"""The regression is scikit-learn's, also where there are more features than samples."""

from __future__ import annotations

import numpy as np
import pytest

from agssd.evaluation.logistic import choose_strength, fit_logistic


def samples(num: int, features: int, num_classes: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(num + features)
    targets = rng.integers(0, num_classes, num)
    return spread * rng.normal(size=(num_classes, features))[targets] + rng.normal(size=(num, features)), targets


@pytest.mark.parametrize("strength", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize(("num", "features"), [(60, 4), (30, 80)])
def test_fit_logistic__equals_scikit_learn(num: int, features: int, strength: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    inputs, targets = samples(num, features, 3, 0.5)
    ours = fit_logistic(inputs, targets, 3, strength)
    theirs = linear_model.LogisticRegression(C=strength, solver="newton-cg", tol=1e-12, max_iter=10000)
    theirs.fit(inputs, targets)
    assert ours.probabilities(inputs) == pytest.approx(theirs.predict_proba(inputs), abs=1e-4)
    assert ours.weight.T == pytest.approx(theirs.coef_, abs=1e-3)


def test_fit_logistic__gradient_is_zero_with_two_classes() -> None:
    inputs, targets = samples(40, 6, 2, 0.3)
    strength = 0.7
    fitted = fit_logistic(inputs, targets, 2, strength)
    excess = fitted.probabilities(inputs) - np.eye(2)[targets]
    assert strength * inputs.T @ excess + fitted.weight == pytest.approx(0, abs=1e-4)
    assert excess.sum(0) == pytest.approx(0, abs=1e-4)


def test_choose_strength__noise_is_held_down_and_signal_is_not() -> None:
    rng = np.random.default_rng(0)
    names = [f"s{n}" for n in range(48)]
    noise, targets = rng.normal(size=(48, 30)), rng.integers(0, 2, 48)
    clear = np.concatenate([4.0 * (2 * targets[:, None] - 1) + 0.1 * rng.normal(size=(48, 1)), 0.01 * noise], 1)
    weak = choose_strength(noise, targets, names, 2)
    strong = choose_strength(clear, targets, names, 2)
    assert weak <= 1e-2 and strong >= 1
    assert choose_strength(noise[:2], targets[:2], names[:2], 2) == 1.0


def test_choose_strength__samples_of_one_subject_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    from agssd.evaluation import logistic

    seen: list[set[float]] = []
    real = logistic.fit_logistic

    def spy(features, targets, num_classes, strength):
        seen.append(set(features[:, 0].tolist()))
        return real(features, targets, num_classes, strength)

    monkeypatch.setattr(logistic, "fit_logistic", spy)
    subjects = [f"s{n // 2}" for n in range(12)]
    logistic.choose_strength(np.arange(12.0)[:, None], np.arange(12) % 2, subjects, 2, [1.0])
    assert len(seen) == 3
    for learned in seen:
        assert all((2 * n in learned) == (2 * n + 1 in learned) for n in range(6)) and len(learned) == 8
