"""VoCo's crops: shares of overlap in 3D, base crops that tile the parent, and air."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import recipes
import torch

from agssd.methods.voco import VoCo

SAMPLES = [0, 1, 2, 3]


def test_voco__labels_are_shares_of_volume_in_three_dimensions(tiny_cache: Path) -> None:
    # The released code moves crops in the plane alone and takes areas there.
    module = recipes.build(VoCo, base_grid=(2, 2, 4), num_crops=3)
    batch = recipes.parents(tiny_cache, SAMPLES)
    # An image that holds its own coordinates tells where a crop lies.
    low = torch.zeros(4, 3, 3)
    for axis, name in enumerate("DHW"):
        ramp = torch.arange(recipes.PARENT[axis]).view([-1 if a == axis else 1 for a in range(3)])
        image = (ramp * 100).expand(recipes.PARENT).to(torch.int16)[None, None].expand(4, 1, -1, -1, -1)
        given = batch | {"image": image, "low": torch.zeros(4, 1), "high": torch.full((4, 1), 1e4)}
        views = module.make_views(given)
        middle = (views.crops.mean((2, 3, 4, 5)) + 1) / 2 * 100 + 0.5  # in voxel edges
        low[:, :, axis] = middle - recipes.PARENT[axis] / (2, 2, 4)[axis] / 2
        assert name
    edge = np.array(recipes.PARENT) / (2, 2, 4)
    for b in range(4):
        for m in range(3):
            for n, cell in enumerate(np.ndindex(2, 2, 4)):
                start = low[b, m].numpy()
                share = 1.0
                for a in range(3):
                    ends = min(start[a], cell[a] * edge[a]) + edge[a], max(start[a], cell[a] * edge[a])
                    share *= max(ends[0] - ends[1], 0) / edge[a]
                assert views.overlap[b, m, n].item() == pytest.approx(share, abs=5e-3)
    torch.testing.assert_close(views.overlap.sum(-1), torch.ones(4, 3))


def test_voco__bases_tile_the_parent(tiny_cache: Path) -> None:
    module = recipes.build(VoCo, {"size_vox": (16, 16, 16)}, base_grid=(2, 2, 2))
    batch = recipes.parents(tiny_cache, [0])
    batch = {name: tensor[..., :32, :32, :32] if tensor.ndim == 5 else tensor for name, tensor in batch.items()}
    views = module.make_views(batch)
    whole = views.bases[0, :, 0].reshape(2, 2, 2, 16, 16, 16).permute(0, 3, 1, 4, 2, 5).reshape(32, 32, 32)
    unit = ((batch["image"][0, 0].float() - batch["low"][0]) / (batch["high"][0] - batch["low"][0])).clamp(0, 1)
    torch.testing.assert_close(whole, unit * 2 - 1, atol=1e-5, rtol=0)


def test_voco__bases_of_air_take_part_in_nothing(tiny_cache: Path) -> None:
    # Defect of the family: crops of air are equal, so no encoder can make them orthogonal; they would rule the loss.
    module = recipes.build(VoCo)
    batch = {name: tensor.clone() for name, tensor in recipes.parents(tiny_cache, SAMPLES).items()}
    half = recipes.PARENT[0] // 2
    batch["image"][:, :, :half] = 0
    batch["foreground"][:, :, :half] = 0
    views = module.make_views(batch)
    assert not views.counts[:, :4].any() and views.counts[:, 4:].all()
    module.eval()
    with torch.no_grad():
        before = module.pretrain_loss(views)
        noise = torch.randn(views.bases[:, :4].shape, generator=torch.Generator().manual_seed(0))
        views.bases[:, :4] = noise
        after = module.pretrain_loss(views)
    for name, value in before.terms.items():
        assert after.terms[name] == value, name


def test_voco__a_grid_of_one_cell_is_refused() -> None:
    with pytest.raises(ValueError, match="base_grid is .*at least two cells"):
        recipes.build(VoCo, base_grid=(1, 1, 1))
