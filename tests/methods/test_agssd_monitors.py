"""What AG-SSD shows of a step: figures, rows for the collapse monitor, and panels of views."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from recipes import build_whole, step_of
from torch import Tensor

from agssd.geometry import token_centres, transform


def test_observations__hold_probabilities_logits_and_figures(batch: Any, at: Any) -> None:
    at(0.6)
    module = build_whole()
    assert module.observations is None
    _, loss, step = step_of(module, batch)
    seen = module.observations
    counted = int(step.counts.sum())
    shapes = {name: tuple(value.shape) for name, value in seen.items() if isinstance(value, Tensor)}
    assert shapes == {
        "teacher_cls": (8, 64),
        "student_cls": (8, 64),
        "teacher_patch": (counted, 64),
        "student_patch": (counted, 64),
        "cls_features": (8, 48),
        "patch_features": (counted, 48),
        "centre_norm_cls": (),
        "centre_norm_patch": (),
    }
    for name in ("teacher_cls", "teacher_patch"):
        torch.testing.assert_close(seen[name].sum(-1), torch.ones(len(seen[name])))
    for name, rows in (("cls", 8), ("patch", counted)):
        log_student = seen[f"student_{name}"].log_softmax(-1)
        assert not seen[f"student_{name}"].requires_grad
        entropy = -(seen[f"teacher_{name}"] * log_student).sum(-1)
        assert entropy.shape == (rows,) and entropy.isfinite().all()
    figures = seen["scalars"]
    assert {"overlap", "mask_ratio", "mask_edge_mass", "cosine_corresponding", "cvaa_gap", "rec_psnr_edge"} <= set(
        figures
    )
    assert all(value.ndim == 0 and value.isfinite() for value in figures.values()), figures
    assert figures["overlap"] >= figures["overlap_target"] - 1e-5
    assert figures["mask_ratio"] == pytest.approx(float(step.mask.float().mean()))
    overlap = step.views.geometry.overlap
    counted = [int(((overlap >= i / 5) & (overlap < (i + 1) / 5)).sum()) for i in range(5)]
    shares = [float(figures[f"overlap_{20 * i}_{20 * i + 20}"]) for i in range(5)]
    assert shares == pytest.approx([count / len(overlap) for count in counted])


def test_observations__teacher_and_student_rows_of_cls_are_the_pairs_of_the_loss(batch: Any, at: Any) -> None:
    at(0.6)
    module = build_whole({"num_local": 0})
    _, loss, _ = step_of(module, batch)
    seen = module.observations
    entropy = -(seen["teacher_cls"] * seen["student_cls"].log_softmax(-1)).sum(-1)
    assert float(entropy.mean()) == pytest.approx(float(loss.terms["cls"]), rel=1e-5)


@pytest.mark.parametrize("given", [{"orientations": "all"}, {"rotation_deg": 15.0}], ids=str)
def test_observations__features_of_the_place_in_the_world_agree_where_views_overlap(given: Any, batch: Any) -> None:
    module = build_whole({"size_vox": (32, 32, 32), **given})
    views, _, step = step_of(module, batch)
    centres = token_centres(module.grid)
    affine = views.geometry.globals.affine
    places = transform(affine.flatten(0, 1), centres.expand(8, -1, -1)).unflatten(0, (4, 2))  # (B, 2, N, 3)
    features = torch.cat([places / 8 - 2, torch.ones_like(places[..., :1])], -1)
    module._step = dataclasses.replace(step, tokens=features)
    figures = module.observations["scalars"]
    assert float(figures["cosine_corresponding"]) == pytest.approx(1.0, abs=1e-5)
    assert float(figures["cosine_random"]) < 0.95
    # The same features without their order agree no more than by chance.
    module._step = dataclasses.replace(step, tokens=features.flip(2))
    assert float(module.observations["scalars"]["cosine_corresponding"]) < 0.95


def test_view_panel__shows_a_sample_and_refuses_others(batch: Any, at: Any) -> None:
    at(0.6)
    module = build_whole({"size_vox": (24, 32, 24)})
    with pytest.raises(IndexError, match="not in the last batch"):
        module.view_panel(0)
    views, _, step = step_of(module, batch)
    for index, hidden in enumerate(views.hidden_view.tolist()):
        panel = module.view_panel(index)
        assert {name: tuple(value.shape) for name, value in panel.items()} == {
            "globals": (2, 24, 32, 24),
            "clean": (2, 24, 32, 24),
            "locals": (2, 16, 16, 16),
            "edges": (2, 24, 32, 24),
            "mask": (2, 3, 4, 3),
            "reconstruction": (2, 24, 32, 24),
            "overlap_box": (2, 3, 2),
            "attention": (2, 3, 3, 4, 3),
        }
        assert torch.equal(panel["mask"][hidden].flatten(), step.mask[index]) and not panel["mask"][1 - hidden].any()
        torch.testing.assert_close(panel["edges"][hidden], views.edges[index, 0])
        changed = panel["reconstruction"] != panel["clean"]
        covered = panel["mask"].repeat_interleave(8, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
        assert not (changed & ~covered).any() and (changed & covered).sum() > 0.99 * covered.sum()
        first = int(step.index[index, 0])
        i, j, k = (8 * int(x) for x in np.unravel_index(first, (3, 4, 3)))
        shown = panel["reconstruction"][hidden, i : i + 8, j : j + 8, k : k + 8]
        torch.testing.assert_close(shown.flatten(), step.predicted[index, 0])
        box = panel["overlap_box"]
        size = torch.tensor([24.0, 32.0, 24.0])
        share = ((box[..., 1] - box[..., 0]) / size).prod(-1)
        assert float(share.max()) == pytest.approx(float(views.geometry.overlap[index]), abs=1e-4)
        assert (panel["attention"] >= 0).all() and (panel["attention"].sum((2, 3, 4)) <= 1 + 1e-5).all()
    with pytest.raises(IndexError, match="sample 4"):
        module.view_panel(4)
