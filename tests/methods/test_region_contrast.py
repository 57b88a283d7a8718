"""RegionContrast: the core that two views share, its two terms, and the defects of the released trainer."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recipes
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from agssd.callbacks.ema_teacher import EMATeacher
from agssd.commands.plan.rehearsal import parent_batch
from agssd.losses.info_nce import region_info_nce
from agssd.methods.region_contrast import RegionContrast
from agssd.models.resnet_fpn import ResNetFPN
from agssd.models.vit import ViT
from agssd.transforms.crops import OverlapCrops

SAMPLES = [0, 1, 2, 3]


def build(dims: int = 3, **given: Any) -> Any:
    """A small module for volumes of 40 or frames of 48, with views of 24."""
    torch.manual_seed(0)
    size = given.pop("size", 24)
    views: dict[str, Any] = {"orientations": "all"} | given.pop("views", {})
    crops = OverlapCrops(
        (size,) * dims, (0.6, 1.3), num_local=0, local_size_vox=(8,) * dims, prob_flip=(0.5,) * dims, **views
    )
    encoder = ViT(given.pop("channels", 1), 8, depth=2, embed_dim=48, num_heads=3, spatial_dims=dims)
    settings: dict[str, Any] = {"num_regions": 6, "head_hidden": 32, "predictor_hidden": 32, "head_dim": 16}
    return RegionContrast(encoder, crops, **settings | given)


def parents(dims: int = 3, channels: int = 1, count: int = 12) -> Any:
    return parent_batch(count, channels, (40,) * 3 if dims == 3 else (48, 48), regions=True)


# ------------------------------------------------------------------ the core


COUNT = {2: 24, 3: 10}  # samples, by axes of space


def places(dims: int) -> Any:
    """Parents whose voxels hold their own coordinates, ten times over."""
    batch = parents(dims, channels=dims, count=COUNT[dims])
    axes = torch.meshgrid(*(torch.arange(n) for n in batch["image"].shape[2:]), indexing="ij")
    return batch | {"image": (10 * torch.stack(axes)).to(torch.int16).expand(COUNT[dims], *[-1] * (dims + 1))}


def inside(affine: Tensor, points: Tensor) -> Tensor:
    """Return (..., M) bool: points (..., M, d) in voxel coordinates that lie in a view."""
    linear = torch.linalg.inv(affine[..., :-1, :-1].double())
    u = (points.double() - affine[..., None, :-1, -1].double()) @ linear.mT
    return (u.abs() <= 1 + 1e-6).all(-1)


@pytest.mark.parametrize("dims", [2, 3])
def test_core__shows_exactly_what_both_views_show(dims: int) -> None:
    """Defect of the released trainer: boxes (top, left, height, width) were intersected as if they held corners."""
    batch = places(dims)
    module = build(dims, channels=dims, appearance=None)
    given = module.make_views(batch)
    length = batch["image"].shape[-1]
    # Every place of the parent, on a lattice of half voxels around its edges: which views show it?
    lattice = torch.cartesian_prod(*[torch.arange(-0.25, length - 0.5, 0.5)] * dims)
    affine = given.views.geometry.globals.affine
    common = torch.stack([inside(affine[:, v], lattice.expand(COUNT[dims], -1, -1)) for v in (0, 1)]).all(0)
    shares = set()
    for b in range(COUNT[dims]):
        shown = lattice[common[b]]
        low, high = given.core_box[b].unbind(-1)
        assert ((shown.amin(0) - (low - 0.5)).abs() <= 0.5).all() and (
            (shown.amax(0) - (high - 0.5)).abs() <= 0.5
        ).all()
        assert len(shown) == pytest.approx(float((2 * (high - low)).prod()), rel=0.2)
        seen = (given.core[b, 0] + 1) * 50  # (d, *size): where in the parent each voxel of the core lies
        n = seen.shape[-1]
        for axis in range(dims):
            wanted = low[axis] - 0.5 + (torch.arange(n) + 0.5) / n * (high[axis] - low[axis])
            row = seen[axis].movedim(axis, 0).flatten(1)
            away = (wanted > 1) & (wanted < length - 2)  # at the border of the parent values are repeated
            assert ((row - wanted[:, None])[away].abs() < 0.02).all()
        shares.add(round(float((high - low).prod()) / 16**dims, 1))
        points = seen.flatten(1).T
        assert inside(affine[b], points.expand(2, -1, -1)).all()
    assert len(shares) > 2 and given.views.geometry.globals.orientation.unique().numel() > 4


@pytest.mark.parametrize("dims", [2, 3])
def test_core__lies_in_both_views_when_they_are_rotated(dims: int) -> None:
    batch = places(dims)
    module = build(dims, channels=dims, appearance=None, views={"orientations": "flips", "rotation_deg": 25.0})
    given = module.make_views(batch)
    counted, smaller = given.core_body.flatten(1).any(1), 0
    boxes = given.views.geometry.overlap_box
    for b in counted.nonzero()[:, 0].tolist():
        points = ((given.core[b, 0] + 1) * 50).flatten(1).T
        assert inside(given.views.geometry.globals.affine[b], points.expand(2, -1, -1)).all()
        edges = [box[b, :, 1] - box[b, :, 0] for box in (given.core_box, boxes)]
        assert (edges[0] <= edges[1] + 1e-4).all()
        smaller += bool((edges[0] < 0.95 * edges[1]).all())
    assert counted.float().mean() > 0.7 and smaller > 3


def test_core__is_corrupted_for_the_student_alone() -> None:
    given = build().make_views(parents())
    apart = (given.core - given.core_inputs).abs().flatten(1).mean(1)
    assert (apart > 0.05).all()
    assert ((given.core >= -1) & (given.core <= 1)).all() and (
        (given.core_inputs >= -1) & (given.core_inputs <= 1)
    ).all()


# ------------------------------------------------------------------ the loss


def moved(module: Any) -> Any:
    """Return the module with a teacher that differs from its student."""
    with torch.no_grad():
        for number, parameter in enumerate(module.teacher.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return module


def by_voxel(map_: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Return the feature (..., C) of the cell that each voxel of an image lies in."""
    for axis, length in enumerate(size):
        map_ = np.repeat(map_, -(-length // map_.shape[axis]), axis)
    return map_


def test_loss__is_its_formula_over_scales() -> None:
    module = moved(build(2, size=32, num_scales=3, core_cells=2)).eval()
    given = module.make_views(parents(2, count=3))
    with torch.no_grad():
        found = module.pretrain_loss(given)
        contrast = context = 0.0
        maps: dict[tuple[str, int], list[Tensor]] = {}
        for name, core in (("student", given.core_inputs), ("teacher", given.core)):
            network = getattr(module, name)
            for b in range(3):
                images = torch.cat([given.views.inputs[b], core[b]])  # two views, then the core
                tokens = network["backbone"].forward_views([images])[0].tokens
                for scale, m in enumerate(network["pyramid"](tokens, grid=(4, 4))):
                    maps.setdefault((name, scale), []).append(m)
        for scale in range(3):
            rows = {}
            for name in ("student", "teacher"):
                means = torch.zeros(3, 2, 6, module.student["pyramid"].channels[scale])
                for b, v, k in np.ndindex(3, 2, 6):
                    region = (given.views.regions[b, v, 0] == given.numbers[b, k]).numpy()
                    voxels = by_voxel(maps[name, scale][b][v].numpy(), region.shape)
                    means[b, v, k] = torch.from_numpy(voxels[region].mean(0))
                rows[name] = getattr(module, name)["projectors"][scale](means)
            queries = module.student["predictor"](rows["student"])
            numbers = given.numbers[:, None].expand(-1, 2, -1)
            contrast += region_info_nce(queries, rows["teacher"], numbers, 0.1).item()
            for b in range(3):
                told, wanted, counts = [], [], []
                for quarter in np.ndindex(2, 2):
                    part = tuple(slice(16 * i, 16 * i + 16) for i in quarter)
                    counts.append(float(given.core_body[b, 0, 0][part].mean()) >= 0.05)
                    for name, cells in (("student", told), ("teacher", wanted)):
                        m = maps[name, scale][b][2]
                        n = len(m) // 2
                        cells.append(m[tuple(slice(n * i, n * i + n) for i in quarter)].flatten(0, 1).mean(0))
                own, other = torch.stack(told), torch.stack(wanted)
                own = module.student["predictor"](module.student["projectors"][scale](own))
                other = module.teacher["projectors"][scale](other)
                context += (2 - 2 * F.cosine_similarity(own, other, dim=1))[counts].mean().item() / 3
    assert (given.numbers > 0).all()
    assert found.terms["contrast"].item() == pytest.approx(contrast, rel=1e-4)
    assert found.terms["context"].item() == pytest.approx(context, rel=1e-4)
    assert found.total.item() == pytest.approx(contrast + context, rel=1e-4)


def test_loss__is_0_without_regions_and_without_a_core() -> None:
    module = build()
    given = module.make_views(parents(count=3))
    nothing = dataclasses.replace(given, numbers=0 * given.numbers, core_body=0 * given.core_body)
    loss = module.pretrain_loss(nothing)
    assert loss.total.item() == 0
    loss.total.backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.student.parameters() if p.requires_grad)


# ------------------------------------------------------------------ defects of the released trainer


def test_first_step__student_and_teacher_are_handed_all_that_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect of the released trainer: its first call of the model lacked an argument."""
    module = build().train()
    calls: list[tuple[str, Any]] = []
    for name in ("student", "teacher"):
        encoder = getattr(module, name)["backbone"]
        plain, signature = encoder.forward, inspect.signature(encoder.forward)

        def spy(*given: Any, name: str = name, plain: Any = plain, signature: Any = signature, **named: Any) -> Any:
            calls.append((name, signature.bind(*given, **named).arguments))
            return plain(*given, **named)

        monkeypatch.setattr(encoder, "forward", spy)
    given = module.make_views(parents(count=3))
    assert module.progress == 0
    assert module.pretrain_loss(given).total.isfinite()
    assert [name for name, _ in calls] == ["teacher", "student"]
    for (_, arguments), core in zip(calls, (given.core, given.core_inputs), strict=True):
        assert torch.equal(arguments["x"], torch.cat([given.views.inputs.flatten(0, 1), core.flatten(0, 1)]))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_teacher__moves_once_per_optimiser_step_and_not_at_every_scale(region_cache: Path, accumulate: int) -> None:
    module, states = recipes.build(RegionContrast, num_scales=4), recipes.States()
    assert len(module.student["projectors"]) == 4
    teacher = {name: value.clone() for name, value in module.state_dict().items() if name.startswith("teacher.")}
    recipes.trainer(states, max_steps=3, accumulate_grad_batches=accumulate).fit(
        module, recipes.data_module(region_cache)
    )
    assert len(states.found) == 3 * accumulate
    for number, state in enumerate(states.found):
        step, rest = divmod(number + 1, accumulate)
        kept = EMATeacher(0.8).momentum(step, 3) if rest == 0 else 1.0
        for name, before in teacher.items():
            now, student = state[name], state[name.replace("teacher.", "student.", 1)]
            wanted = kept * before + (1 - kept) * student if before.is_floating_point() else student
            torch.testing.assert_close(now, wanted, rtol=0, atol=1e-6)
        teacher = {name: state[name] for name in teacher}


def test_fit__without_region_maps_says_how_to_get_them(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    module, plain = recipes.build(RegionContrast), make_cache(tmp_path / "plain.h5")
    remedy = r"agssd regions CACHE --source supervoxels.*--data\.regions true"
    with pytest.raises(ValueError, match=f"RegionContrast: batches have no region maps.*{remedy}"):
        recipes.trainer().fit(module, recipes.data_module(plain))
    with pytest.raises(ValueError, match=r"has no region map; .*agssd regions .* --source supervoxels"):
        recipes.trainer().fit(module, recipes.data_module(plain, regions=True))
    data = recipes.data_module(plain)
    data.setup("validate")
    assert data.train_crops is not None
    loader: DataLoader[Any] = DataLoader(data.train_crops, batch_size=2, sampler=[0, 1])
    with pytest.raises(ValueError, match=remedy):
        recipes.trainer().fit(module, loader)


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_loss__a_map_of_one_cell_counts_0_and_is_told(family: str, caplog: pytest.LogCaptureFixture) -> None:
    encoder = (
        ResNetFPN(1, "basic", (1, 1, 1, 1), 8, 48, 8, 4)
        if family == "resnet"
        else ViT(1, 8, depth=1, embed_dim=48, num_heads=3)
    )
    side = max(encoder.level_strides[-1]) if family == "resnet" else 16  # a ViT's coarsest map has half its tokens
    crops = OverlapCrops((side,) * 3, (0.6, 1.3), num_local=0, local_size_vox=(8,) * 3)
    module = RegionContrast(encoder, crops, num_regions=6, head_hidden=32, predictor_hidden=32, head_dim=16)
    assert module.tells == [True] * (len(module.tells) - 1) + [False]
    assert "1 of the 4 maps have one cell" in caplog.text
    given = module.make_views(parents(count=2))
    found = module.pretrain_loss(given)
    found.total.backward()
    assert all(p.grad is not None for p in module.student.parameters() if p.requires_grad)
    for scale, projector in enumerate(module.student["projectors"]):
        assert any(p.grad.any() for p in projector.parameters()) == module.tells[scale]


def test_build__an_encoder_of_one_cell_alone_is_refused() -> None:
    crops = OverlapCrops((16,) * 3, (0.6, 1.3), num_local=0, local_size_vox=(16,) * 3)
    with pytest.raises(ValueError, match=r"maps of one cell.*views\.size_vox"):
        RegionContrast(ViT(1, 16, depth=1, embed_dim=48, num_heads=3), crops, num_scales=1)


def test_heads__are_one_projector_per_scale_and_one_predictor() -> None:
    module = build(num_scales=2)
    assert isinstance(module.student["projectors"], nn.ModuleList) and len(module.student["projectors"]) == 2
    assert sum(name.startswith("predictor.") for name, _ in module.student.named_parameters()) == 6
