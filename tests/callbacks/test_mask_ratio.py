"""The mask ratio is set before the views of a step are made, and shared by its micro-batches."""

from __future__ import annotations

import csv
import math

import pytest

from agssd.callbacks.mask_ratio import MaskRatioSchedule


def test_mask_ratio__default_leaves_the_ratio_of_the_method(toy, loader, make_trainer) -> None:
    module = toy()
    module.mask_ratio = (0.75, 0.8)
    make_trainer(MaskRatioSchedule(), max_steps=4).fit(module, loader)
    assert module.ratios_at_views == [(0.75, 0.8)] * 4


def test_mask_ratio__range_replaces_the_ratio_of_the_method(toy, loader, make_trainer) -> None:
    module = toy()
    make_trainer(MaskRatioSchedule("range"), max_steps=4).fit(module, loader)
    assert module.ratios_at_views == [(0.3, 0.7)] * 4


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("constant", lambda progress: 0.4),
        ("linear", lambda progress: 0.4 + 0.4 * progress),
        ("cosine", lambda progress: 0.8 - 0.4 * (1 + math.cos(math.pi * progress)) / 2),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_mask_ratio__views_see_the_value_of_their_step(toy, loader, make_trainer, kind, value, accumulate) -> None:
    module = toy()
    schedule = MaskRatioSchedule(kind, 0.4, 0.8)
    make_trainer(schedule, max_steps=5, accumulate_grad_batches=accumulate).fit(module, loader)
    expected = [value(step / 5) for step in range(5) for _ in range(accumulate)]
    assert [low for low, _ in module.ratios_at_views] == pytest.approx(expected, abs=1e-12)
    assert all(low == high for low, high in module.ratios_at_views)


def test_mask_ratio__logs_what_the_views_saw(toy, loader, make_trainer, tmp_path) -> None:
    module = toy()
    make_trainer(MaskRatioSchedule("linear", 0.2, 0.6), max_steps=4).fit(module, loader)
    with open(tmp_path / "metrics.csv", newline="") as file:
        logged = [float(row["train/mask_ratio_low"]) for row in csv.DictReader(file)]
    assert logged == pytest.approx([low for low, _ in module.ratios_at_views], abs=1e-6)


def test_mask_ratio__is_inert_or_an_error_for_a_module_without_masks(plain, loader, make_trainer) -> None:
    callback = MaskRatioSchedule()
    module = plain()
    make_trainer(callback, max_steps=2).fit(module, loader)
    assert not hasattr(module, "mask_ratio")
    callback.explicit = True
    with pytest.raises(ValueError, match="MaskScheduled"):
        make_trainer(callback, max_steps=2).fit(plain(), loader)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "step"}, "mask_ratio.kind is 'step'"),
        ({"start": 0.0}, "mask_ratio.start is 0.0"),
        ({"end": 1.0}, "mask_ratio.end is 1.0"),
        ({"kind": "range", "start": 0.7, "end": 0.3}, "needs start <= end"),
    ],
)
def test_mask_ratio__nonsense_is_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        MaskRatioSchedule(**settings)
