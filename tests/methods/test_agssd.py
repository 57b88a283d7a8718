"""AG-SSD's step: what is hidden, what counts, what is compared with what, and what never sees what."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recipes
import torch
from recipes import build_whole, step_of
from torch import Tensor

from agssd.transforms.edges import MIN_FOREGROUND
from agssd.transforms.views import edge_maps


def body_of(views: Any) -> np.ndarray:
    """Return (B, N): share of body of each token of the hidden view, by loops."""
    grid = [size // 8 for size in views.foreground.shape[-3:]]
    shares = np.zeros((len(views.sample), int(np.prod(grid))))
    for b, hidden in enumerate(views.hidden_view.tolist()):
        volume = views.foreground[b, hidden, 0].numpy()
        for n, (i, j, k) in enumerate(np.ndindex(*grid)):
            shares[b, n] = volume[8 * i : 8 * i + 8, 8 * j : 8 * j + 8, 8 * k : 8 * k + 8].mean()
    return shares


def half_background(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch with the lower half of every parent made air."""
    batch = {name: tensor.clone() for name, tensor in batch.items()}
    half = batch["image"].shape[2] // 2
    batch["image"][:, :, :half] = 0
    batch["foreground"][:, :, :half] = 0
    return batch


# ------------------------------------------------------------------ what is hidden


@pytest.mark.parametrize("score", ["edge", "random", "block"])
@pytest.mark.parametrize(
    ("ratio", "size"),
    [((0.3, 0.7), (24, 24, 24)), ((0.5, 0.5), (24, 24, 24)), ((0.7, 0.7), (24, 24, 40)), ((0.1, 0.1), (24, 40, 24))],
)
def test_agssd__hides_the_exact_count_in_one_of_the_two_views(
    score: str, ratio: tuple[float, float], size: tuple[int, int, int], batch: Any, at: Any, monkeypatch: Any
) -> None:
    at(0.7)
    module = build_whole({"size_vox": size}, mask_ratio=ratio, mask_score=score)
    given: list[Any] = []
    encode = module.student["backbone"].forward_views

    def spy(views: Any, masks: Any, noise: Any) -> Any:
        given.extend([views, masks])
        return encode(views, masks, noise)

    monkeypatch.setattr(module.student["backbone"], "forward_views", spy)
    views, _, step = step_of(module, batch)
    groups, (masks, local_masks) = given
    assert torch.equal(groups[0], views.inputs.flatten(0, 1)) and local_masks is None
    hidden = masks.reshape(4, 2, -1)
    tokens = hidden.shape[-1]
    for b, view in enumerate(views.hidden_view.tolist()):
        assert not hidden[b, 1 - view].any()
        assert torch.equal(hidden[b, view], step.mask[b])
        assert ratio[0] <= step.ratio[b] + 1e-6 and step.ratio[b] <= ratio[1] + 1e-6
        # Halves may round either way in float32.
        assert abs(int(step.mask[b].sum()) - float(step.ratio[b]) * tokens) <= 0.5 + 1e-4
        # Every hidden token that holds body enters the losses, once.
        counted = step.index[b][step.counts[b]]
        expected = step.mask[b].numpy() & (body_of(views)[b] >= MIN_FOREGROUND)
        assert sorted(counted.tolist()) == np.flatnonzero(expected).tolist()


def test_agssd__both_views_are_hidden_equally_often(tiny_cache: Path) -> None:
    batch = recipes.parents(tiny_cache, [0])
    many = {name: tensor.expand(400, *tensor.shape[1:]) for name, tensor in batch.items()} | {
        "sample": torch.arange(400)
    }
    small = {"size_vox": (8, 8, 8), "num_local": 0}
    parts = [build_whole(small).make_views(recipes.take(many, slice(i, i + 50))) for i in range(0, 400, 50)]
    share = torch.cat([part.hidden_view for part in parts]).float().mean()
    assert abs(share - 0.5) < 4 * 0.5 / 400**0.5


def test_agssd__edge_quota_and_temperature_hide_more_edges_as_the_run_proceeds(tiny_cache: Path, at: Any) -> None:
    module = build_whole({"size_vox": (32, 32, 32)}, mask_hints=0.0, mask_edge_share=1.0)
    views = module.make_views(recipes.parents(tiny_cache, list(range(8))))
    mass = []
    with torch.no_grad():
        for progress in (0.0, 0.5, 1.0):
            at(progress)
            module.pretrain_loss(views)
            figures = module.observations["scalars"]
            mass.append(float(figures["mask_edge_mass"] / figures["mask_ratio"]))
    assert mass[0] < mass[1] < mass[2] and mass[2] > 1.15


# ------------------------------------------------------------------ what counts


def test_agssd__background_tokens_enter_neither_loss_nor_centre(batch: Any) -> None:
    # norm_pix off: the floor of its scale is a share of the spread of the whole view, background included.
    module = build_whole(assignment="centring", centre_momentum=(0.9, 0.9), norm_pix=False)
    views, loss, step = step_of(module, half_background(batch))
    shares = body_of(views)
    hidden_background = step.mask.numpy() & (shares < MIN_FOREGROUND)
    assert hidden_background.sum() > 4, "the batch must hide background for this test to say something"
    counted = np.zeros_like(hidden_background)
    for b in range(4):
        counted[b, step.index[b][step.counts[b]].numpy()] = True
    assert not (counted & hidden_background).any()

    # The centre after one step: a tenth of the mean logit of the tokens that count.
    with torch.no_grad():
        tokens = torch.stack([step.tokens[b, v] for b, v in enumerate(views.hidden_view.tolist())])
        logits = module.teacher["patch_head"](tokens)
    module.after_optimizer_step()
    expected = 0.1 * logits[torch.from_numpy(counted)].mean(0)
    torch.testing.assert_close(module.centre_patch.centre, expected, rtol=0, atol=1e-6)

    # What stands in the background of the target changes no loss.
    noisy = views.clean.clone()
    for b, hidden in enumerate(views.hidden_view.tolist()):
        for n in np.flatnonzero(hidden_background[b]):
            i, j, k = (8 * int(x) for x in np.unravel_index(n, module.grid))
            noisy[b, hidden, :, i : i + 8, j : j + 8, k : k + 8] = 5.0
    again = module.pretrain_loss(dataclasses.replace(views, clean=noisy))
    assert torch.equal(again.terms["rec"], loss.terms["rec"])


@pytest.mark.parametrize("score", ["edge", "region", "entropy", "attention", "loss", "random", "block"])
@pytest.mark.parametrize("cvaa", ["student", "teacher", "casa", "none"])
def test_agssd__sample_without_body_gives_finite_loss_and_gradient(score: str, cvaa: str, batch: Any, at: Any) -> None:
    at(0.6)
    module = build_whole(mask_score=score, cvaa=cvaa)
    for rows in (slice(0, 1), slice(0, 4)):  # the whole batch without body, then one sample of four
        airy = {name: tensor.clone() for name, tensor in recipes.take(batch, rows).items()}
        airy["foreground"][0] = 0
        airy["image"][0] = 0
        airy["edge_q99"][0] = 0
        module.zero_grad()
        _, loss, step = step_of(module, airy)
        assert not step.counts[0].any() and step.mask[0].any()
        loss.total.backward()
        assert loss.total.isfinite()
        gradients = [p.grad for p in module.student.parameters()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    module.after_optimizer_step()
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())


def test_agssd__centres_stay_without_a_token_that_counts(batch: Any) -> None:
    module = build_whole()
    airy = {name: tensor.clone() for name, tensor in batch.items()}
    airy["foreground"][:] = 0
    step_of(module, airy)
    module.after_optimizer_step()
    assert not module.centre_patch.centre.any() and not module.centre_fused.centre.any()
    assert module.centre_cls.centre.any()


@pytest.mark.parametrize("score", ["edge", "entropy", "attention", "loss"])
def test_agssd__flat_volume_is_masked_at_random(score: str, batch: Any, at: Any) -> None:
    at(1.0)
    flat = {name: tensor.clone() for name, tensor in batch.items()}
    flat["image"][:] = 300
    flat["foreground"][:] = 1
    flat["edge_q99"][:] = 0
    module = build_whole(mask_score=score, teacher_score_edges=1.0)
    views, loss, step = step_of(module, flat)
    assert loss.total.isfinite() and not views.edges.any()
    assert torch.equal(step.mask.sum(1), (step.ratio * step.mask.shape[1]).round().long())
    assert len({tuple(row) for row in step.mask.tolist()}) == 4


def test_agssd__computed_tomography_and_magnetic_resonance_share_a_batch(
    make_cache: Any, tmp_path: Path, tiny_cache: Path, at: Any
) -> None:
    at(0.6)
    ct = recipes.parents(make_cache(tmp_path / "ct.h5", num_cases=2, modality="ct", splits=["train", "train"]), [0, 1])
    mri = recipes.parents(tiny_cache, [2, 3])
    module = build_whole()
    both = {name: torch.cat([ct[name], mri[name]]) for name in ct}
    views, loss, _ = step_of(module, both)
    assert views.is_ct.tolist() == [True, True, False, False]
    assert views.clean[:2].min() >= 0 and views.inputs[:2].min() >= 0 and views.clean[2:].min() < -0.9
    assert views.clean.max() <= 1 and views.inputs.max() <= 1
    separate = [module.pretrain_loss(module.make_views(part)) for part in (ct, mri)]
    for name, term in loss.terms.items():  # a mean over samples, whatever their modality
        mean = sum(part.terms[name].item() for part in separate) / 2
        assert term.item() == pytest.approx(mean, rel=1e-5), name


# ------------------------------------------------------------------ what is compared with what


def softmax(x: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis."""
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def holds_body(foreground: Tensor, n: int, grid: tuple[int, ...]) -> bool:
    """Return whether token ``n`` of a view, foreground (1, D, H, W), holds enough body to count."""
    i, j, k = (8 * int(x) for x in np.unravel_index(n, grid))
    return float(foreground[0, i : i + 8, j : j + 8, k : k + 8].double().mean()) >= 0.05


def misplaced(
    module: Any, views: Any, b: int, v: int, mask: Tensor, student: Tensor, teacher: Tensor
) -> tuple[float, list[float]]:
    """Return the cross-entropy of where shown body of view ``v`` is looked for in the other view with where it is.

    Beside it how far off the best guess of each token is, in pitches of the other view.
    """
    grid = np.array(module.grid)
    places = np.array([(2 * np.array(index) + 1) / grid - 1 for index in np.ndindex(*module.grid)])
    own, other = (views.geometry.globals.affine[b, one].double().numpy() for one in (v, 1 - v))
    with torch.no_grad():
        keys = module.student["aligner"].key(teacher).double().numpy()
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    losses, misses = [], []
    for n in np.flatnonzero(~mask.numpy()):
        there = np.linalg.inv(other) @ own @ np.append(places[n], 1)
        inside = (np.abs(there[:3]) <= 1 + 1e-5).all()  # a token in the other view by its centre
        if not inside or not holds_body(views.foreground[b, v], n, module.grid):
            continue
        with torch.no_grad():
            query = module.student["aligner"].query(student[n]).double().numpy()
        apart = (((places - there[:3]) * grid / 2) ** 2).sum(1)
        target = softmax(-apart / (2 * module.align_pitches**2))
        cosines = keys @ query / np.linalg.norm(query)
        losses.append(-(target * np.log(softmax(cosines / module.hparams.align_temperature))).sum())
        misses.append(np.abs((places[cosines.argmax()] - there[:3]) * grid / 2).max())
    return float(np.mean(losses)) if losses else 0.0, misses


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"norm_pix": False, "clean_teacher": False},
        {"masked_views": 2},
        {"student_views": "masked"},
        {"student_views": "masked", "num_local": 0},
        {"student_views": "masked", "clean_teacher": False},
        {"student_views": "visible", "distilled_share": 0.4, "align_temperature": 0.3},
        {"student_views": "visible", "masked_views": 2, "num_local": 0, "weight_align": 3.0, "align_pitches": 0.8},
    ],
    ids=[
        "defaults",
        "plain",
        "both",
        "one",
        "one and no locals",
        "one in a shared appearance",
        "left out",
        "both left out",
    ],
)
def test_agssd__objective_equals_a_reference_by_loops(settings: dict[str, Any], batch: Any, at: Any) -> None:
    at(0.15)
    given = {"num_local": settings["num_local"]} if "num_local" in settings else None
    settings = {name: value for name, value in settings.items() if name != "num_local"}
    module = build_whole(given, cvaa="none", drop_path=0.0, assignment="centring", **settings)
    for centre in (module.centre_cls, module.centre_patch):
        centre.centre.copy_(torch.randn(64, generator=torch.Generator().manual_seed(1)) * 0.05)
    views, loss, step = step_of(module, half_background(batch))
    centre_cls, centre_patch = module.centre_cls.centre.numpy(), module.centre_patch.centre.numpy()
    cls, patch, rec, align, misses = [], [], [], [], []
    for b, hidden in enumerate(views.hidden_view.tolist()):
        masks = {hidden: step.mask[b]} if module.masked_views == 1 else {v: step.mask[2 * b + v] for v in (0, 1)}
        student, teacher, scores, worked_out = [], [], [], {}
        with torch.no_grad():
            for v in (0, 1):
                image = views.inputs[b, v][None]
                if module.student_views == "visible" and v in masks:
                    visible = torch.tensor([[n for n, hides in enumerate(masks[v].tolist()) if not hides]])
                    features = module.student["backbone"].forward_visible(image, visible)
                    tokens = torch.full((1, len(masks[v]), features.tokens.shape[2]), torch.nan)
                    tokens[0, visible[0]] = features.tokens[0]
                    worked_out[v] = module.student["decoder"](features, visible)
                    student.append(features._replace(tokens=tokens))
                else:
                    mask = masks[v].reshape(1, *module.grid) if v in masks else None
                    student.append(module.student["backbone"].forward_views([image], [mask])[0])
                    worked_out[v] = student[-1].tokens
                teacher.append(module.teacher["backbone"](views.clean[b, v][None] if module.clean_teacher else image))
            for features in teacher:
                scores.append(module.teacher["cls_head"](features.cls)[0].double().numpy())
            seen = [module.student["cls_head"](features.cls)[0].double().numpy() for features in student]
            for image in () if views.locals is None else views.locals[b]:
                features = module.student["backbone"](image[None])
                seen.append(module.student["cls_head"](features.cls)[0].double().numpy())
        pairs = []
        unseen = {1 - hidden} if module.student_views != "both" and module.masked_views == 1 else set()
        for q in (0, 1):
            target = softmax((scores[q] - centre_cls) / 0.04)
            others = [logits for v, logits in enumerate(seen) if v != q and v not in unseen]
            pairs += [-(target * np.log(softmax(logits / 0.1))).sum() for logits in others]
        cls.append(np.mean(pairs))
        temperature = 0.04 + (0.07 - 0.04) * 0.5  # half of 30 % of the run
        for v, mask in masks.items():
            with torch.no_grad():
                teacher_patch = module.teacher["patch_head"](teacher[v].tokens)[0].double().numpy()
                student_patch = module.student["patch_head"](worked_out[v])[0].double().numpy()
                predicted = module.student["reconstruction"](worked_out[v])[0].double().numpy()
            edges = edge_maps(views, torch.full((len(views.sample),), v))[b].double().numpy()
            clean = views.clean[b, v].double().numpy()
            losses, error, weights = [], 0.0, 0.0
            row = b if module.masked_views == 1 else 2 * b + v
            distilled = set(step.distilled[row].tolist())
            assert len(distilled) == int(np.ceil(module.distilled_share * step.index.shape[1]))
            assert distilled <= set(step.index[row].tolist())
            body = {n for n in np.flatnonzero(mask.numpy()) if holds_body(views.foreground[b, v], n, module.grid)}
            assert len(distilled & body) == min(len(distilled), len(body)), "body before air"
            for n in np.flatnonzero(mask.numpy()):
                i, j, k = (8 * int(x) for x in np.unravel_index(n, module.grid))
                box = (0, slice(i, i + 8), slice(j, j + 8), slice(k, k + 8))
                if n not in body:
                    continue
                if n in distilled:
                    target = softmax((teacher_patch[n] - centre_patch) / temperature)
                    losses.append(-(target * np.log(softmax(student_patch[n] / 0.1))).sum())
                weight, voxels = 1 + edges[box].ravel(), clean[box].ravel()
                if module.norm_pix:
                    voxels = (voxels - voxels.mean()) / max(voxels.std(), 0.05 * clean.std())
                error += (weight * np.abs(predicted[n] - voxels)).sum()
                weights += weight.sum()
            patch.append(np.mean(losses))
            rec.append(error / weights)
            placed = misplaced(module, views, b, v, mask, student[v].tokens[0], teacher[1 - v].tokens[0])
            align.append(placed[0])
            misses += placed[1]
    assert float(loss.terms["cls"]) == pytest.approx(np.mean(cls), rel=1e-5)
    assert float(loss.terms["patch"]) == pytest.approx(np.mean(patch), rel=1e-5)
    assert float(loss.terms["rec"]) == pytest.approx(np.mean(rec), rel=1e-5)
    assert float(loss.terms["align"]) == pytest.approx(np.mean(align), rel=1e-5)
    if module.weights["align"]:
        assert float(module.observations["scalars"]["align_distance"]) == pytest.approx(np.mean(misses), rel=1e-4)
    means = {"cls": np.mean(cls), "patch": np.mean(patch), "rec": np.mean(rec), "align": np.mean(align)}
    total = sum(module.weights[name] * mean for name, mean in means.items())
    assert float(loss.total) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("student_views", ["both", "visible"])
def test_agssd__masks_of_both_views_are_drawn_apart_and_shown(student_views: str, batch: Any, at: Any) -> None:
    at(0.6)
    module = build_whole(masked_views=2, student_views=student_views)
    views, _, step = step_of(module, batch)
    masks = step.mask.unflatten(0, (4, 2))
    assert (masks.sum(2) > 0).all() and not (masks[:, 0] == masks[:, 1]).all(1).any()
    figures = module.observations["scalars"]
    assert all(torch.isfinite(value) for value in figures.values())
    panel = module.view_panel(2)
    assert torch.equal(panel["mask"].flatten(1), masks[2])
    changed = panel["reconstruction"] != panel["clean"]
    covered = panel["mask"].repeat_interleave(8, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert not (changed & ~covered).any() and (changed & covered).sum() > 0.99 * covered.sum()
    with pytest.raises(IndexError, match="sample 4"):
        module.view_panel(4)
    with pytest.raises(ValueError, match="masked_views is 3; give 1 or 2"):
        build_whole(masked_views=3)


@pytest.mark.parametrize("masked_views", [1, 2])
def test_agssd__voxels_that_are_left_out_never_enter_the_student(masked_views: int, batch: Any, at: Any) -> None:
    at(0.6)
    module = build_whole(student_views="visible", masked_views=masked_views, mask_ratio=(0.6, 0.6))
    views, loss, step = step_of(module, batch)
    hides = step.mask.unflatten(1, module.grid)
    for axis in (1, 2, 3):
        hides = hides.repeat_interleave(8, axis)
    hidden, shown = views.inputs.clone(), views.inputs.clone()
    for row, covered in enumerate(hides):
        b = row // masked_views
        v = int(views.hidden_view[b]) if masked_views == 1 else row % 2
        hidden[b, v, 0][covered] += 1
        shown[b, v, 0][~covered] += 1
    totals = [module.pretrain_loss(dataclasses.replace(views, inputs=x)).total for x in (hidden, shown)]
    assert torch.equal(totals[0], loss.total) and not torch.isclose(totals[1], loss.total, rtol=1e-4)
    loss.total.backward()
    unused = {"backbone.mask_token"}
    assert all(p.grad is not None or name in unused for name, p in module.student.named_parameters())
    assert not module.student["backbone"].mask_token.requires_grad
    assert module.observations["scalars"]["align_distance"].isfinite()


@pytest.mark.parametrize("score", ["loss", "attention"])
def test_agssd__left_out_by_what_the_teacher_says(score: str, batch: Any, at: Any) -> None:
    at(0.9)
    module = build_whole(student_views="visible", mask_ratio=(0.6, 0.6), mask_score=score)
    _, loss, step = step_of(module, batch)
    assert loss.total.isfinite() and (step.mask.sum(1) == step.mask[0].sum()).all()


def test_agssd__settings_that_leave_nothing_out_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mask_ratio is \(0.3, 0.7\), .* give the same number twice"):
        build_whole(student_views="visible", mask_ratio=(0.3, 0.7))
    with pytest.raises(ValueError, match="SwinUNETREncoder cannot leave tokens out; use a ViT"):
        build_whole(student_views="visible", backbone=recipes.SECOND)
    with pytest.raises(ValueError, match="casa .* student_views is visible .* set student_views to both"):
        build_whole(student_views="visible", masked_views=2, cvaa="casa")
    with pytest.raises(ValueError, match="align_pitches is 0.0; give a spread above 0"):
        build_whole(align_pitches=0.0)
    with pytest.raises(ValueError, match="align_temperature is 0.0; a temperature lies above 0"):
        build_whole(align_temperature=0.0)
    with pytest.raises(ValueError, match=r"distilled_share is 0.0; give a share .* in \(0, 1\]"):
        build_whole(distilled_share=0.0)


@pytest.mark.parametrize("num_local", [0, 2])
def test_agssd__student_of_masked_views_never_sees_the_other(num_local: int, batch: Any, at: Any) -> None:
    at(0.6)
    strong = {"prob_noise": 1.0, "noise": 0.2, "prob_gamma": 1.0}
    both = build_whole({"num_local": num_local}, appearance=strong)
    module = build_whole({"num_local": num_local}, appearance=strong, student_views="masked")
    wide, views = both.make_views(batch), module.make_views(batch)
    for b, hidden in enumerate(views.hidden_view.tolist()):
        assert torch.equal(views.inputs[b, hidden], wide.inputs[b, hidden])
        assert torch.equal(views.inputs[b, 1 - hidden], views.clean[b, 1 - hidden])
    noisy = views.inputs.clone()
    for b, hidden in enumerate(views.hidden_view.tolist()):
        noisy[b, 1 - hidden] += 1
    totals = [module.pretrain_loss(dataclasses.replace(views, inputs=x)).total for x in (views.inputs, noisy)]
    assert torch.equal(*totals)
    totals[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.student.parameters())
    observations = module.observations
    assert len(observations["teacher_cls"]) == len(observations["student_cls"]) == 4
    panel = module.view_panel(1)
    assert torch.equal(panel["globals"], noisy[1, :, 0])
    assert panel["unseen"].tolist() == [int(views.hidden_view[1]) != 0, int(views.hidden_view[1]) != 1]
    assert not panel["mask"][panel["unseen"]].any()
    for more in ({"weight_koleo": 0.1}, {"assignment": "sinkhorn"}):
        other = build_whole({"num_local": num_local}, student_views="masked", **more)
        assert other.pretrain_loss(other.make_views(batch)).total.isfinite()
    with pytest.raises(ValueError, match="casa .* set student_views to both"):
        build_whole(cvaa="casa", student_views="masked")
    build_whole(cvaa="casa", student_views="masked", masked_views=2)


def test_agssd__reconstructs_the_clean_view(batch: Any) -> None:
    module = build_whole(appearance={"prob_noise": 1.0, "noise": 0.2, "prob_gamma": 1.0})
    views, _, step = step_of(module, batch)
    assert ((views.inputs - views.clean).abs().mean((2, 3, 4, 5)) > 0.01).all()
    for b, hidden in enumerate(views.hidden_view.tolist()):
        for m in range(step.index.shape[1]):
            i, j, k = (8 * int(x) for x in np.unravel_index(int(step.index[b, m]), module.grid))
            expected = views.clean[b, hidden, 0, i : i + 8, j : j + 8, k : k + 8].flatten()
            assert torch.equal(step.target[b, m], expected)


def test_agssd__the_teacher_does_not_know_the_appearance_that_the_student_sees(batch: Any) -> None:
    strong = {"prob_noise": 1.0, "noise": 0.2, "prob_gamma": 1.0}
    tokens, inputs = [], []
    for appearance in (None, strong):
        module = build_whole(appearance=appearance)
        views, _, step = step_of(module, batch)
        tokens.append(step.tokens)
        inputs.append(views.inputs)
    assert not torch.equal(*inputs) and torch.equal(*tokens)
    module = build_whole(appearance=strong, clean_teacher=False)
    assert not torch.equal(step_of(module, batch)[2].tokens, tokens[0])


def test_agssd__predictions_of_standardised_patches_are_shown_as_intensities(batch: Any) -> None:
    module = build_whole()
    with torch.no_grad():
        for parameter in module.student["reconstruction"].parameters():
            parameter.zero_()  # the mean of each patch, in units of its own
    _, _, step = step_of(module, batch)
    torch.testing.assert_close(step.predicted, step.target.mean(-1, keepdim=True).expand_as(step.target))


def test_agssd__weights_scale_their_terms_and_zero_keeps_the_graph(batch: Any, at: Any) -> None:
    at(0.6)
    base = build_whole()
    views = base.make_views(batch)
    terms = base.pretrain_loss(views).terms
    weights = {name: weight for name, weight in base.weights.items() if name != "koleo"}
    assert weights == {"cls": 0.02, "patch": 0.2, "rec": 10.0, "align": 1.0}
    for name in weights:
        module = build_whole(**{f"weight_{'reconstruction' if name == 'rec' else name}": 0.0})
        loss = module.pretrain_loss(views)
        expected = sum(float(terms[other]) * w for other, w in weights.items() if other != name)
        assert float(loss.total) == pytest.approx(expected, rel=1e-5)
        loss.total.backward()
        assert all(p.grad is not None for p in module.student.parameters()), f"{name} left the graph at weight 0"


# ------------------------------------------------------------------ precision


def test_agssd__heads_do_not_underflow_in_half_precision(batch: Any) -> None:
    module = build_whole()
    features = (torch.randn(6, 48, generator=torch.Generator().manual_seed(0)) * 1e-3).half()
    for name in ("cls_head", "patch_head"):
        head = module.student[name]
        with torch.autocast("cpu", torch.float16):
            logits = head(features)
        assert logits.dtype == torch.float32 and torch.equal(logits, head(features.float()))
        assert logits.std() > 0.05, "features of tiny norm are still projected onto the sphere"
    for factor in (50.0, 1e4):
        targets = module.centre_cls.targets(factor * logits, 0.04)
        assert targets.isfinite().all()
        torch.testing.assert_close(targets.sum(-1), torch.ones(6))


# ------------------------------------------------------------------ bad settings


@pytest.mark.parametrize("views", [{"size_vox": (20, 24, 24)}, {"local_size_vox": (12, 12, 12)}], ids=str)
def test_agssd__view_that_the_patch_does_not_divide_is_refused(views: Any) -> None:
    with pytest.raises(ValueError, match="not divisible by patch_size"):
        build_whole(views)


def test_agssd__block_that_does_not_divide_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="mask_block is 2, which does not divide the token grid"):
        build_whole(mask_block=2)
