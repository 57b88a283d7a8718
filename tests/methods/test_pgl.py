"""PGL's step: which points meet, and which do not count."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import equations
import numpy as np
import pytest
import recipes
import torch
import torch.nn.functional as F
from torch import Tensor

from agssd.methods.pgl import PGL
from agssd.transforms.crops import extract

SAMPLES = [0, 1, 2, 3]
VIEWS = {"orientations": "all", "size_vox": (32, 32, 32)}


def moved(module: Any) -> Any:
    """Return the module with a teacher that differs from its student."""
    with torch.no_grad():
        for number, parameter in enumerate(module.teacher.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return module


def read(tokens: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Trilinear reading of tokens (n, n, n, E) at one u in [-1, 1]³, border repeated, by loops."""
    n = tokens.shape[0]
    at = np.clip((u + 1) / 2 * n - 0.5, 0, n - 1)
    low = np.minimum(np.floor(at).astype(int), n - 2)
    total = np.zeros(tokens.shape[-1])
    for corner in np.ndindex(2, 2, 2):
        share = np.prod([f if c else 1 - f for f, c in zip(at - low, corner, strict=True)])
        total += share * tokens[tuple(low + corner)]
    return total


def test_pgl__is_the_mean_distance_over_the_points_of_the_overlap(tiny_cache: Path) -> None:
    module = moved(recipes.build(PGL, VIEWS, points_per_axis=3)).eval()
    views = module.make_views(equations.half_air(recipes.parents(tiny_cache, SAMPLES)))
    with torch.no_grad():
        given = module.pretrain_loss(views).total.item()
        total, left_out = 0.0, 0
        for b in range(4):
            affine = views.geometry.globals.affine[b].double().numpy()
            low, high = views.geometry.overlap_box[b].double().numpy().T
            points: dict[tuple[str, int], list[np.ndarray]] = {}
            maps: dict[str, list[np.ndarray]] = {"student": [], "teacher": []}
            for name in maps:
                tokens = getattr(module, name)["backbone"](views.inputs[b]).tokens
                maps[name] = [t.reshape(4, 4, 4, -1).double().numpy() for t in tokens]
            body = views.foreground[b, :, 0].double().numpy().reshape(2, 4, 8, 4, 8, 4, 8).mean((2, 4, 6))[..., None]
            counts = []
            for index in np.ndindex(3, 3, 3):
                # The parent's voxel i lies between its edges i and i + 1.
                place = low + (np.array(index) + 0.5) / 3 * (high - low) - 0.5
                u = [np.linalg.solve(a[:3, :3], place - a[:3, 3]) for a in affine]
                counts.append(min(read(body[v], u[v])[0] for v in (0, 1)) >= 0.05)
                for name, view in ((name, view) for name in maps for view in (0, 1)):
                    points.setdefault((name, view), []).append(read(maps[name][view], u[view]))
            seen = {key: torch.from_numpy(np.array(rows)).float() for key, rows in points.items()}
            distances = []
            for own, other in ((0, 1), (1, 0)):
                p = module.student["predictor"](module.student["projector"](seen["student", own]))
                t = module.teacher["projector"](seen["teacher", other])
                distances.append(2 - 2 * torch.cosine_similarity(p, t, dim=1).numpy())
            values = np.mean(distances, 0)[counts]
            left_out += 27 - sum(counts)
            total += np.mean(values) / 4
    assert 4 < left_out < 4 * 27, "the batch has no air to leave out"
    assert given == pytest.approx(total, rel=1e-4)


def places_of(module: Any, batch: dict[str, Tensor], views: Any) -> tuple[Tensor, Tensor]:
    """Return (B, 3, r³) of each view: what its points read where every voxel holds its place in the parent."""
    points = module._points(views).flip(-1)[:, :, :, None, None]
    shape = batch["image"].shape[2:]
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in shape), indexing="ij")
    cut = extract(torch.stack(axes).expand(len(points), -1, -1, -1, -1), views.geometry.globals, (32, 32, 32))
    first, second = (
        F.grid_sample(cut[:, v], points[:, v], align_corners=False, padding_mode="border")[..., 0, 0] for v in (0, 1)
    )
    return first, second


def test_pgl__points_lie_at_the_same_place_of_the_image_in_both_views(tiny_cache: Path) -> None:
    # Defect of the family: boxes that are compared before flips, scales or half voxels are undone. Coordinates of the
    # parent, written into its voxels and cut like an image, must read the same at the same point.
    module = recipes.build(PGL, VIEWS)
    batch: dict[str, Tensor] = recipes.parents(tiny_cache, SAMPLES)
    views = module.make_views(batch)
    points = module._points(views)
    first, second = places_of(module, batch, views)
    assert views.geometry.globals.orientation.unique().numel() > 2
    assert (first - second).abs().max() < 0.1  # voxels; borders of a view repeat, the pre-blur is even
    inside = points.abs().amax((1, 3)) < 0.9
    assert inside.any() and (first - second).abs().amax(1)[inside].max() < 1e-3


def test_pgl__corners_of_the_overlap_that_a_rotation_turns_out_of_a_view_do_not_count(tiny_cache: Path) -> None:
    module = recipes.build(PGL, {"size_vox": (32, 32, 32), "rotation_deg": 40.0})
    batch: dict[str, Tensor] = recipes.parents(tiny_cache, SAMPLES)
    batch["foreground"] = torch.ones_like(batch["foreground"])
    views = module.make_views(batch)
    module.pretrain_loss(views)
    counts = module._step[3]
    first, second = places_of(module, batch, views)
    apart = (first - second).abs().amax(1)
    assert apart.max() > 1, "no point is outside"
    assert 0.3 < counts.float().mean() < 1 and apart[counts].max() < 0.3


def test_pgl__points_in_air_change_nothing(tiny_cache: Path) -> None:
    module = moved(recipes.build(PGL, VIEWS)).eval()
    views = module.make_views(recipes.parents(tiny_cache, SAMPLES))
    with torch.no_grad():
        whole = module.pretrain_loss(views).total
        counts = module._step[3]
        airless = dataclasses.replace(views, foreground=torch.zeros_like(views.foreground))
        assert module.pretrain_loss(airless).total == 0
    assert 0 < counts.float().mean() <= 1 and whole > 0
