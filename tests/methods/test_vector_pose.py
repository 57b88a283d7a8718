"""VectorPOSE: poses against an image that holds its own coordinates, and the weight of boundaries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import recipes
import torch

from agssd.data_modules.cache import VolumeCache
from agssd.methods.vector_pose import VectorPOSE, pose_vectors
from agssd.transforms.views import edge_maps

SAMPLES = list(range(6))
SPACING = (2.0, 1.0, 0.5)


@pytest.fixture(scope="module")
def anisotropic(make_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache of large volumes with three different spacings."""
    path = tmp_path_factory.mktemp("pose") / "pose.h5"
    return make_cache(path, 2, (64, 72, 70), spacing_mm=SPACING, splits=["train", "val"])


def find(whole: np.ndarray, crop: np.ndarray) -> np.ndarray:
    """Return the first voxel of ``crop`` in ``whole``, by comparison."""
    room = [a - b + 1 for a, b in zip(whole.shape, crop.shape, strict=True)]
    for start in np.ndindex(*room):
        part = whole[tuple(slice(s, s + n) for s, n in zip(start, crop.shape, strict=True))]
        if part[16, 16, 16] == crop[16, 16, 16] and (part == crop).all():
            return np.array(start)
    raise AssertionError("the crop is not in the volume")


def test_pose_vectors__say_where_every_voxel_lies(anisotropic: Path) -> None:
    # Defect of the family: labels that forget the parent's place in the volume, flips, or spacing. The reference is the
    # image itself: each parent is replaced by the place of its voxels in mm, and cut like an image.
    module = recipes.build(VectorPOSE, {"orientations": "all", "size_vox": (32, 32, 32)})
    batch = recipes.parents(anisotropic, SAMPLES)
    cache = VolumeCache(anisotropic)
    whole = cache.read_whole(cache.select(split="train")[0])[0]
    starts = [find(whole, image[0].numpy()) for image in batch["image"]]
    assert len({tuple(start) for start in starts}) > 1
    places = np.zeros((len(SAMPLES), 3, 2, 32, 32, 32))
    for axis in range(3):
        ramp = np.arange(recipes.PARENT[axis]).reshape([-1 if a == axis else 1 for a in range(3)])
        ramp = torch.from_numpy(np.broadcast_to(ramp * 100, recipes.PARENT).astype(np.int16).copy())
        given = batch | {"image": ramp.expand(len(SAMPLES), 1, -1, -1, -1)}
        given |= {"low": torch.zeros(len(SAMPLES), 1), "high": torch.full((len(SAMPLES), 1), 1e4)}
        views = module.make_views(given)
        voxels = (views.clean[:, :, 0].double().numpy() + 1) / 2 * 100
        offset = np.array([start[axis] for start in starts])[:, None, None, None, None]
        places[:, axis] = (voxels + offset + 0.5 - whole.shape[axis] / 2) * SPACING[axis]
    poses = pose_vectors(views).double().numpy()
    for b in range(len(SAMPLES)):
        for v in (0, 1):
            pose, image = poses[b, v], places[b, :, v]  # (3, 32, 32, 32): mm from the volume's centre
            np.testing.assert_allclose(image.mean((1, 2, 3)), 100 * pose[:3], atol=0.1)
            for own in range(3):
                inner = np.moveaxis(image, own + 1, 1)[:, 4:-4]
                step = (inner[:, -1] - inner[:, 0]).mean((1, 2)) / 23  # mm per voxel along the view's axis
                assert np.linalg.norm(step) * 32 == pytest.approx(100 * np.exp(pose[3 + own]), rel=0.01)
                if own < 2:
                    unit = pose[6 + 3 * own : 9 + 3 * own]
                    np.testing.assert_allclose(step / np.linalg.norm(step), unit, atol=1e-3)


def test_vector_pose__is_smooth_l1_and_an_l1_weighted_by_edges(tiny_cache: Path) -> None:
    module = recipes.build(VectorPOSE, drop_path=0.0).eval()
    views = module.make_views(recipes.parents(tiny_cache, [0, 1]))
    with torch.no_grad():
        loss = module.pretrain_loss(views)
        mask = module._step[1]
        features = module.backbone.forward_views([views.clean.flatten(0, 1)], [mask])[0]
        pose, truth = module.student["pose"](features.cls).double().numpy(), pose_vectors(views).flatten(0, 1).numpy()
        d = np.abs(pose - truth)
        assert loss.terms["pose"].item() == pytest.approx(np.where(d < 1, d**2 / 2, d - 0.5).mean(), rel=1e-4)
        voxels = module.student["reconstruction"](features.tokens).double().numpy()
        edges = [edge_maps(views, torch.full((2,), v))[:, 0] for v in (0, 1)]
    total = []
    for row in range(4):
        b, v = divmod(row, 2)
        above = below = 0.0
        for n, cell in enumerate(np.ndindex(3, 3, 3)):
            where = tuple(slice(8 * i, 8 * i + 8) for i in cell)
            if not mask[row][cell] or views.foreground[b, v, 0][where].float().mean() < 0.05:
                continue
            weight = 1 + 4 * edges[v][b][where].double().numpy()
            above += (weight * np.abs(voxels[row, n].reshape(8, 8, 8) - views.clean[b, v, 0][where].numpy())).sum()
            below += weight.sum()
        total.append(above / below)
    assert loss.terms["rec"].item() == pytest.approx(np.mean(total), rel=1e-4)
    torch.testing.assert_close(loss.total, loss.terms["pose"] + loss.terms["rec"])


def test_vector_pose__pose_does_not_hang_on_the_parent_crop(tiny_cache: Path) -> None:
    module = recipes.build(VectorPOSE)
    views = module.make_views(recipes.parents(tiny_cache, [0, 1]))
    moved = dataclasses.replace(views, centre_mm=views.centre_mm + torch.tensor([100.0, -50.0, 0.0]))
    difference = pose_vectors(moved) - pose_vectors(views)
    expected = torch.tensor([1.0, -0.5] + [0.0] * 10).expand_as(difference)
    torch.testing.assert_close(difference, expected, atol=1e-6, rtol=0)


def test_observations__errors_have_their_units(tiny_cache: Path) -> None:
    module = recipes.build(VectorPOSE)
    module.pretrain_loss(module.make_views(recipes.parents(tiny_cache, [0, 1])))
    views, mask, _, truth, features = module._step
    off = truth.clone()
    off[..., 0] += 0.03  # 3 mm
    off[..., 3:6] += float(np.log(1.1))
    off[..., 6:9], off[..., 9:] = truth[..., 9:], -truth[..., 6:9]  # a quarter turn about the third axis
    module._step = (views, mask, off, truth, features)
    figures = module.observations["scalars"]
    assert figures["centre_error_mm"].item() == pytest.approx(3, rel=1e-3)
    assert figures["edge_error"].item() == pytest.approx(0.1, rel=1e-3)
    assert figures["rotation_error_deg"].item() == pytest.approx(90, rel=1e-3)
