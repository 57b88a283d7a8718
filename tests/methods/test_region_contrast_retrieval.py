"""What RegionContrast teaches: regions of unseen bodies find the same organ in other bodies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_anatomy
import numpy as np
import pytest
import recipes
import torch

from agssd.data_modules.cache import VolumeCache
from agssd.data_modules.pretrain import PretrainDataModule
from agssd.data_modules.regions import write_regions
from agssd.methods.region_contrast import RegionContrast
from agssd.models.backbone import Backbone
from agssd.models.resnet_fpn import ResNetFPN
from agssd.regions.labels import LabelRegions
from agssd.transforms.crops import OverlapCrops
from agssd.transforms.regions import RegionSlots

SIZES = {2: (72, 48), 3: (40, 32)}  # of a body and of a view, by axes of space
STEPS, BATCH = {2: 1500, 3: 600}, 4
BODIES = {"train": 256, "test": 64}
APPEARANCE = {"prob_gamma": 1.0, "gamma": 2.0, "prob_histogram": 1.0, "prob_blur": 0.5, "prob_noise": 0.5}


def build(dims: int, seed: int) -> RegionContrast:
    torch.manual_seed(seed)
    encoder = ResNetFPN(1, "basic", (1, 1, 1), 16, 64, 8, 8, spatial_dims=dims)
    size = SIZES[dims][1]
    crops = OverlapCrops(
        (size,) * dims, (0.6, 1.3), num_local=0, local_size_vox=(8,) * dims, prob_flip=(0.5,) * dims, orientations="all"
    )
    heads: dict[str, Any] = {"head_hidden": 128, "predictor_hidden": 128, "head_dim": 64}
    return RegionContrast(
        encoder,
        crops,
        num_regions=made_anatomy.NUM_REGIONS,
        lr=1e-3,
        negatives="image",
        seed=seed,
        appearance=APPEARANCE,
        **heads,
    )


@torch.no_grad()
def retrieval(encoder: Backbone, cache: VolumeCache) -> float:
    """Return how often the nearest region of another body is the same organ, by mean features of frozen tokens."""
    encoder.eval()
    features, organs, bodies = [], [], []
    for row in cache.select("test"):
        image = torch.from_numpy(cache.read_whole(row).astype(np.float32)) / 255 * 2 - 1
        label = torch.from_numpy(cache.read_whole(row, "label").astype(np.int64))
        if encoder.spatial_dims == 2:
            image, label = image[:, 0], label[0]
        seen = encoder(image[None])
        numbers = torch.arange(1, made_anatomy.NUM_REGIONS + 1)[None]
        features.append((RegionSlots(label[None], numbers).weights(seen.grid) @ seen.tokens)[0])
        organs.append(numbers[0])
        bodies.append(torch.full_like(numbers[0], row))
    rows, organ, body = torch.cat(features), torch.cat(organs), torch.cat(bodies)
    rows = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)  # what all regions share tells nothing
    cosines = (rows @ rows.T).masked_fill(body[:, None] == body, -2)
    return float((organ[cosines.argmax(1)] == organ).float().mean())


@pytest.mark.slow
@pytest.mark.parametrize("dims", [2, 3])
def test_region_contrast_retrieval__rises_above_random_weights_and_random_regions(
    dims: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    size = SIZES[dims][0]
    plain = made_anatomy.build_set(tmp_path / "plain.h5", dims, size, **BODIES)
    sources = {"anatomy": LabelRegions(), "random": made_anatomy.RandomCells()}
    for name, source in sources.items():
        list(write_regions(plain, tmp_path / f"{name}.h5", source))
    cache = VolumeCache(plain)
    found: dict[str, list[float]] = {"untrained": [], "random": [], "anatomy": []}
    for seed in range(3):
        found["untrained"].append(retrieval(build(dims, seed).backbone, cache))
        for name in sources:
            module = build(dims, seed)
            data = PretrainDataModule(
                str(tmp_path / f"{name}.h5"), (size,) * dims, BATCH, num_workers=0, seed=seed, regions=True
            )
            recipes.trainer(max_steps=STEPS[dims]).fit(module, data)
            found[name].append(retrieval(module.backbone, cache))
    told = ", ".join(f"{name} {' '.join(f'{v:.3f}' for v in values)}" for name, values in found.items())
    record_property(
        "printed", f"region retrieval in {dims}D, 3 seeds (chance {1 / made_anatomy.NUM_REGIONS:.3f}): {told}"
    )
    assert np.mean(found["anatomy"]) > np.mean(found["untrained"]) + 0.05
    assert np.mean(found["anatomy"]) > np.mean(found["random"]) + 0.02
    assert all(taught > by_chance for taught, by_chance in zip(found["anatomy"], found["random"], strict=True))
