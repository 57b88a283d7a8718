"""S2DC's step: which tokens meet, what is learned and kept, and what the released code forgets."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recipes
import torch
from equations import half_air, numbers, sinkhorn_with_dustbin

from agssd.losses.token_matching import TokenPairs
from agssd.methods.s2dc import S2DC
from agssd.transforms.crops import extract

SAMPLES = [0, 1, 2, 3]
VIEWS = {"orientations": "all", "size_vox": (32, 32, 32)}
SMALL: dict[str, Any] = {"head_dim": 16, "queue_size": 24}


def build(views: dict[str, Any] | None = None, **given: Any) -> Any:
    """Return a small module whose teacher differs from its student."""
    module = recipes.build(S2DC, VIEWS if views is None else views, **SMALL | given)
    with torch.no_grad():
        for number, parameter in enumerate(module.teacher.parameters()):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return module


def test_s2dc__terms_are_those_of_the_equations(tiny_cache: Path) -> None:
    module = build().eval()
    views = module.make_views(recipes.parents(tiny_cache, SAMPLES))
    given = module.pretrain_loss(views)
    student, teacher = module.student, module.teacher
    wanted: dict[str, list[float]] = {"discrepancy": [], "consistency": [], "global": []}
    with torch.no_grad():
        for b in range(4):
            # The student sees clean views, the teacher changed ones.
            own, seen = student["backbone"](views.clean[b]), teacher["backbone"](views.inputs[b])
            q, k = numbers(student["token_head"](own.tokens)), numbers(teacher["token_head"](seen.tokens))
            for v in (0, 1):
                places = [_centres(views.geometry.globals.affine[b, w].double().numpy()) for w in (v, 1 - v)]
                body = [_body(views.foreground[b, w, 0]) for w in (v, 1 - v)]
                inside = [_inside(views.geometry.globals, b, 1 - v, places[0])]
                inside.append(_inside(views.geometry.globals, b, v, places[1]))
                distance = np.linalg.norm(places[0][:, None] - places[1][None], axis=-1)
                truth = np.zeros(distance.shape, bool)
                for i in range(len(distance)):
                    j = distance[i].argmin()
                    mutual = distance[:, j].argmin() == i and inside[0][i] and inside[1][j]
                    truth[i, j] = mutual and body[0][i] and body[1][j]
                unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q[v], k[1 - v])]
                cosines = (unit[0] @ unit[1].T)[body[0]][:, body[1]]
                kept = truth[body[0]][:, body[1]]
                lost = [~inside[0][body[0]], ~inside[1][body[1]]]
                plan = sinkhorn_with_dustbin(cosines, 0.1, 0.0)
                ends = np.concatenate([plan[:-1, -1][lost[0]], plan[-1, :-1][lost[1]]])
                means = [-np.log(plan[:-1, :-1][kept]), -np.log(1 - plan[:-1, :-1][~kept]), -np.log(ends)]
                wanted["discrepancy"].append(sum(x.mean() if x.size else 0.0 for x in means))
                apart = -np.log(1 - (1 + cosines[~kept]) / 2)
                wanted["consistency"].append(_weighted((1 + cosines) / 2, kept) + apart.mean())
                key, query = teacher["global_head"](seen.cls)[1 - v], student["global_head"](own.cls)[v]
                negatives = [numbers(row) for row in module.queue.keys]
                logits = [_cosine(numbers(query), other) / 0.9 for other in [numbers(key), *negatives]]
                wanted["global"].append(math.log(sum(map(math.exp, logits))) - logits[0])
    for name, values in wanted.items():
        assert given.terms[name].item() == pytest.approx(np.mean(values), rel=2e-3), name
    assert given.total.item() == pytest.approx(0.5 * sum(term.item() for term in given.terms.values()), rel=1e-6)


def _centres(affine: np.ndarray) -> np.ndarray:
    axis = (2 * np.arange(4) + 1) / 4 - 1
    u = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    places: np.ndarray = u @ affine[:3, :3].T + affine[:3, 3]
    return places


def _inside(geometry: Any, b: int, v: int, places: np.ndarray) -> np.ndarray:
    """Whether parent voxels lie in the box of a view."""
    centre, edge = geometry.centre[b, v].double().numpy() - 0.5, geometry.edge[b, v].double().numpy()
    inside: np.ndarray = (np.abs(places - centre) <= edge / 2).all(1)
    return inside


def _body(foreground: torch.Tensor) -> np.ndarray:
    shares = foreground.double().numpy().reshape(4, 8, 4, 8, 4, 8).mean((1, 3, 5)).reshape(-1)
    body: np.ndarray = shares >= 0.05
    return body


def _weighted(s: np.ndarray, pairs: np.ndarray) -> float:
    total = 0.0
    for similar, chosen in ((s, pairs), (s.T, pairs.T)):
        if chosen.any():
            sharp = np.exp((similar.max(1) - similar.mean(1)) / similar.std(1, ddof=1)) * chosen.any(1)
            apart = np.where(chosen, -np.log(similar), 0).sum(1)
            total += (sharp / sharp.sum() * apart).sum() / 2
    return total


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_s2dc__counterparts_hold_the_same_place_of_the_image_in_any_orientation(tiny_cache: Path) -> None:
    # Coordinates of the parent, written into its voxels and cut like an image, agree at counterparts to half a cell.
    batch = recipes.parents(tiny_cache, list(range(24)))
    module = build()
    views = module.make_views(batch)
    orientation = views.geometry.globals.orientation
    assert len({tuple(pair) for pair in orientation.tolist()}) > 20
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in batch["image"].shape[2:]), indexing="ij")
    cut = extract(torch.stack(axes).expand(24, -1, -1, -1, -1), views.geometry.globals, (32, 32, 32))
    tokens = torch.nn.functional.avg_pool3d(cut.flatten(0, 1), 8).flatten(2).mT  # (48, 64, 3), their middles
    others = tokens.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    pairs = module._pairs(views)
    there = others.gather(1, pairs.partner[..., None].expand(-1, -1, 3))
    pitch = (views.geometry.globals.edge / 4).amax(1).repeat_interleave(2, 0)  # of the coarser view, along the parent
    distance = (there - tokens).abs() / pitch[:, None]
    assert distance[pairs.paired].max() < 0.55 and pairs.paired.sum(1).min() > 0
    # And with these coordinates for features, the transport finds them.
    feature = torch.cat([tokens / 40, torch.ones_like(tokens[..., :1])], -1)
    other = torch.cat([others / 40, torch.ones_like(others[..., :1])], -1)
    near = 1 - 40 * torch.cdist(feature, other).square()  # 1 where they are the same place
    plan = module.student["transport"](near, pairs.rows, pairs.columns).exp()[:, :-1, :-1]
    assert (plan.argmax(2) == pairs.partner)[pairs.paired].float().mean() > 0.9
    assert pairs.of_partner(plan)[pairs.paired].mean() > 100 * plan[pairs.others].mean()


def test_s2dc__pairs_are_the_same_from_both_sides(tiny_cache: Path) -> None:
    module = build()
    pairs = module._pairs(module.make_views(recipes.parents(tiny_cache, SAMPLES)))
    assert torch.equal(pairs.matrix[::2].mT, pairs.matrix[1::2]) and pairs.matrix.any()
    assert torch.equal(pairs.lost_rows[::2], pairs.lost_columns[1::2])
    assert not (pairs.paired & pairs.lost_rows).any()


def test_s2dc__air_takes_part_in_nothing(tiny_cache: Path) -> None:
    batch = half_air(recipes.parents(tiny_cache, SAMPLES))
    module = build().eval()
    views = module.make_views(batch)
    pairs = module._pairs(views)
    shares = torch.nn.functional.avg_pool3d(views.foreground.flatten(0, 1).float(), 8).flatten(1)
    assert torch.equal(pairs.rows, shares >= 0.05) and not pairs.rows.all()
    assert not ((pairs.paired | pairs.lost_rows) & ~pairs.rows).any()
    airless = dataclasses.replace(views, foreground=torch.zeros_like(views.foreground))
    terms = module.pretrain_loss(airless).terms
    assert terms["discrepancy"] == 0 and terms["consistency"] == 0 and terms["global"] > 0


def test_s2dc__a_few_pairs_of_views_at_a_time_give_the_same(tiny_cache: Path) -> None:
    whole, few = build(), build(matched_at_once=3)
    views = whole.make_views(recipes.parents(tiny_cache, SAMPLES))
    results = []
    for module in (whole, few):
        loss = module.pretrain_loss(views)
        loss.total.backward()
        results.append(
            (loss.total, module.student["transport"].dustbin.grad, module.student["token_head"].mlp[0].weight.grad)
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_s2dc__dustbin_is_trained_with_the_rest_and_stored(tiny_cache: Path, tmp_path: Path) -> None:
    # Defect of the released code: the dustbin is a parameter of no module.
    module = build()
    groups = module.configure_optimizers().param_groups
    dustbin = module.student["transport"].dustbin
    assert any(p is dustbin for p in groups[1]["params"]) and groups[1]["weight_decay"] == 0
    trainer = recipes.trainer(max_steps=3)
    trainer.fit(module, recipes.data_module(tiny_cache))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert stored["student.transport.dustbin"] == dustbin.detach() != 0
    fixed = build(transport_temperature=1.0, dustbin=1.0, learn_dustbin=False)
    recipes.trainer(max_steps=2).fit(fixed, recipes.data_module(tiny_cache))
    assert fixed.student["transport"].dustbin == fixed.teacher["transport"].dustbin == 1.0


def test_s2dc__queue_moves_once_per_optimiser_step_and_not_while_validating(tiny_cache: Path) -> None:
    module = build()
    start = module.queue.keys.clone()
    recipes.trainer(max_steps=2, accumulate_grad_batches=4).fit(module, recipes.data_module(tiny_cache))
    assert module.queue.seen == 8 and torch.equal(module.queue.keys[8:], start[8:])  # one key per sample
    module.eval()
    with torch.no_grad():
        module.pretrain_loss(module.make_views(recipes.parents(tiny_cache, SAMPLES)))
    module.after_optimizer_step()
    assert module.queue.seen == 8


def test_s2dc__queue_survives_a_checkpoint_bit_for_bit(tiny_cache: Path, tmp_path: Path) -> None:
    module, data = build(), recipes.data_module(tiny_cache)
    trainer = recipes.trainer(max_steps=3)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = build(seed=5)
    assert not torch.equal(other.queue.keys, module.queue.keys)
    other.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(other.queue.keys, module.queue.keys) and other.queue.seen == module.queue.seen == 12
    assert torch.equal(other.queue.mean, module.queue.mean) and other.queue.mean.any()


def test_s2dc__forward_leaves_the_teacher_where_it_is(tiny_cache: Path) -> None:
    # Defect of the released code: the momentum update runs in every forward pass.
    module = build()
    before = {name: tensor.clone() for name, tensor in module.teacher.state_dict().items()}
    for _ in range(2):
        module.pretrain_loss(module.make_views(recipes.parents(tiny_cache, SAMPLES))).total.backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in module.teacher.state_dict().items())


def test_s2dc__figures_for_monitors(tiny_cache: Path) -> None:
    module = build()
    assert module.observations is None
    views = module.make_views(recipes.parents(tiny_cache, SAMPLES))
    module.pretrain_loss(views)
    seen = module.observations
    assert seen is not None
    pairs: TokenPairs = module._pairs(views)
    figures = {name: value.item() for name, value in seen["scalars"].items()}
    assert figures["valid_pairs"] == pairs.matrix.sum().item() / 8
    assert figures["dustbin"] == 0 and figures["queue_fill"] == 0
    assert -20 < figures["log_pair_mass"] < 0 and 0 < figures["dustbin_share_lost"] < 1
    assert 0 <= figures["own_key_found"] <= 1
    assert all(math.isfinite(value) for value in figures.values())
    assert seen["cls_features"].shape == (8, 48) and len(seen["patch_features"]) == pairs.rows.sum()
    assert module.view_panel(0)["clean"].shape == (2, 32, 32, 32)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"matched_at_once": 0}, "matched_at_once is 0"),
        ({"contrast_temperature": 0.0}, "contrast_temperature is 0"),
        ({"transport_temperature": -1.0}, "transport temperature is -1"),
        ({"queue_size": 0}, "queue_size is 0"),
    ],
)
def test_s2dc__refuses_settings_out_of_range(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build(**given)
