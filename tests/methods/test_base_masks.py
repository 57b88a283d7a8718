"""Every score in every recipe that masks: exact counts, easy to hard, and what a teacher says."""

from __future__ import annotations

import dataclasses
import inspect
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import equations
import numpy as np
import pytest
import recipes
import torch
from torch import Tensor

from agssd.methods.base import PretrainModule
from agssd.methods.dino import DINO
from agssd.methods.dinov2 import DINOv2
from agssd.methods.ibot import IBOT
from agssd.methods.simmim import SimMIM
from agssd.models.heads import ReconstructionHead
from agssd.models.vit import ViT
from agssd.transforms.keyed_random import KeyedRandom
from agssd.transforms.masking import TEACHER_SCORES, MaskSampler, MaskScore, mask_counts

MASKED = [kind for kind in recipes.find_recipes() if "mask_score" in inspect.signature(kind).parameters]
SCORES = get_args(MaskScore)
every_masked = pytest.mark.parametrize("kind", MASKED, ids=lambda kind: kind.__name__)
TOKENS = 27


class Drawn(Exception):
    """Ends a step once its masks are drawn."""


@dataclasses.dataclass
class Draw:
    """What one step drew: all of V views."""

    hidden: Tensor  # (V, N) bool
    ratio: Tensor  # (V,)
    body: Tensor  # (V, N) bool
    scores: Tensor  # (V, N) z-scores


def drawn(module: Any, views: Any, progress: float, monkeypatch: pytest.MonkeyPatch) -> Draw:
    """Return what the recipe hides at a share of the run; nothing after the draw is run."""
    seen: list[Draw] = []
    draw = MaskSampler.draw

    def spy(self: MaskSampler, random: Any, ratio: Tensor, at: float, body: Tensor, *given: Any) -> Tensor:
        mask = draw(self, random, ratio, at, body, *given)
        seen.append(Draw(mask.flatten(1), ratio, body, self.scores(body, *given)))
        assert at == progress
        raise Drawn

    with monkeypatch.context() as patch:
        patch.setattr(MaskSampler, "draw", spy)
        patch.setattr(PretrainModule, "progress", property(lambda self: progress))
        with pytest.raises(Drawn):
            module.pretrain_loss(views)
    return seen[0]


def leave_student(module: Any) -> Any:
    """Return the module with a teacher unlike its student and with attention that prefers something."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.teacher.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    module.teacher["backbone"].blocks[-1].attn.qkv.weight.mul_(3.0)
    return module


def by_score_alone(kind: Any, score: str) -> Any:
    """Return a module whose third of hidden patches shows its score: no edges in it.

    Patches are not standardised, which makes the errors of a teacher that has learnt nothing nearly equal.
    """
    known = inspect.signature(kind).parameters
    alone = {name: value for name, value in {"teacher_score_edges": 0.0, "norm_pix": False}.items() if name in known}
    return recipes.build(kind, mask_score=score, mask_ratio=(1 / 3, 1 / 3), **alone)


@pytest.fixture(scope="module")
def batch(tiny_cache: Path) -> Any:
    return recipes.parents(tiny_cache, list(range(12)))


def test_masked_recipes__offer_every_score() -> None:
    assert len(MASKED) >= 6
    for kind in MASKED:
        offered = [variant["mask_score"] for variant in recipes.variants(kind) if "mask_score" in variant]
        assert {*offered, inspect.signature(kind).parameters["mask_score"].default} == set(SCORES)


@every_masked
@pytest.mark.parametrize("score", SCORES)
def test_masked_recipe__hides_the_exact_count_and_what_scores_high_late_in_the_run(
    kind: Any, score: str, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = by_score_alone(kind, score)
    if module.has_teacher:
        leave_student(module)
    views = module.make_views(batch)
    preference = []
    for progress in (0.0, 1.0):
        draw = drawn(module, views, progress, monkeypatch)
        assert torch.equal(draw.hidden.sum(1), mask_counts(draw.ratio, (3, 3, 3), 1))
        assert len(draw.hidden) in (12, 24) and not draw.scores.requires_grad
        assert draw.scores.dtype == torch.float32 and draw.scores.isfinite().all()
        preference.append(float(draw.scores[draw.hidden & draw.body].mean() - draw.scores[draw.body].mean()))
    if score in ("random", "block"):
        assert preference == [0.0, 0.0]
    else:
        assert abs(preference[0]) < 0.15 and preference[1] > preference[0] + 0.15, preference


@every_masked
@pytest.mark.parametrize("score", TEACHER_SCORES)
def test_masked_recipe__scores_are_the_teachers_alone_and_leave_no_gradient(
    kind: Any, score: str, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = leave_student(recipes.build(kind, mask_score=score))
    views = module.make_views(recipes.take(batch, slice(0, 3)))
    first = drawn(module, views, 1.0, monkeypatch)
    assert len({tuple(row) for row in first.scores.tolist()}) == len(first.scores)
    for parameter in module.student.parameters():
        parameter.data.mul_(1.5)
    module.train()  # stochastic depth is the student's
    assert torch.equal(drawn(module, views, 1.0, monkeypatch).scores, first.scores)
    leave_student(module)
    assert not torch.allclose(drawn(module, views, 1.0, monkeypatch).scores, first.scores, atol=1e-3)
    assert all(parameter.grad is None for parameter in module.parameters())


@every_masked
@pytest.mark.parametrize("score", TEACHER_SCORES)
def test_masked_recipe__scores_do_not_depend_on_the_cut_of_the_batch(
    kind: Any, score: str, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = leave_student(recipes.build(kind, mask_score=score))
    if "sinkhorn" in module.couples_samples and score == "loss":
        pytest.skip("Sinkhorn balances over the samples of a micro-batch")
    whole = drawn(module, module.make_views(recipes.take(batch, slice(0, 3))), 1.0, monkeypatch)
    parts = [module.make_views(recipes.take(batch, slice(b, b + 1))) for b in range(3)]
    scores = torch.cat([drawn(module, part, 1.0, monkeypatch).scores for part in parts])
    torch.testing.assert_close(scores, whole.scores, rtol=0, atol=1e-4)


def planted(module: Any, batch: Any) -> tuple[Any, Tensor]:
    """Return views that are flat but for noise in the first third of their slices, and that third (N,)."""
    views = module.make_views(batch)
    noise = torch.randn(views.clean.shape, generator=torch.Generator().manual_seed(2))
    noise[..., 8:, :, :] = 0
    edges = None if views.edges is None else torch.zeros_like(views.edges)
    body = torch.ones_like(views.foreground)
    return dataclasses.replace(views, clean=noise, inputs=noise, foreground=body, edges=edges), torch.arange(TOKENS) < 9


def assert_third_is_hidden_late(module: Any, views: Any, third: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    module.masks.score_share, module.masks.temperature = 1.0, (4.0, 0.3)
    early, late = (drawn(module, views, progress, monkeypatch).hidden for progress in (0.0, 1.0))
    assert float(early[:, third].sum() / early.sum()) == pytest.approx(1 / 3, abs=0.15)
    assert float(late[:, third].sum() / late.sum()) > 0.6


@every_masked
def test_masked_recipe__loss_hides_what_the_teacher_cannot_predict(
    kind: Any, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = by_score_alone(kind, "loss")
    # A teacher that takes everything hidden for flat: right but for the noise.
    teacher = module.teacher
    teacher["backbone"].mask_token.copy_(teacher["backbone"].patch_bias)  # the embedding of a flat patch
    for module_of_teacher in teacher.modules():
        if isinstance(module_of_teacher, ReconstructionHead):
            module_of_teacher.linear.weight.zero_()
    views, third = planted(module, batch)
    assert_third_is_hidden_late(module, views, third, monkeypatch)


@every_masked
def test_masked_recipe__attention_hides_what_the_teacher_attends_to(
    kind: Any, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = by_score_alone(kind, "attention")
    views, third = planted(module, batch)
    # A teacher whose [CLS] attends to tokens of the noise, in its first head.
    block = module.teacher["backbone"].blocks[-1]
    attended = torch.full((3, TOKENS), 1e-3)
    attended[0, third] = 0.1

    def rows(x: Any, groups: Any, grids: Any, rotations: Any) -> list[Tensor]:
        assert block is not None and grids == [(3, 3, 3)]
        return [attended.unflatten(1, grids[0]).expand(groups[0].samples, -1, -1, -1, -1)]

    monkeypatch.setattr(module.teacher["backbone"], "_cls_rows", rows)
    assert_third_is_hidden_late(module, views, third, monkeypatch)


@pytest.mark.parametrize("kind", [IBOT, DINOv2], ids=lambda kind: kind.__name__)
def test_distilling_recipe__loss_is_the_cross_entropy_of_the_teachers_own_prediction(
    kind: Any, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = leave_student(recipes.build(kind, mask_score="loss"))
    views = module.make_views(equations.half_air(recipes.take(batch, slice(0, 3))))
    got = drawn(module, views, 0.1, monkeypatch)
    now = module.schedules(0.1)
    temperature = now["temperature_patch" if kind is IBOT else "temperature_teacher"]
    encoder, head = module.teacher["backbone"], module.teacher["head" if kind is IBOT else "patch_head"]
    view = torch.stack([views.inputs[b, v] for b, v in enumerate(views.hidden_view.tolist())])
    whole = equations.numbers(head(encoder.forward_views([view])[0].tokens))
    order = KeyedRandom.from_keys(KeyedRandom(0, views.sample, "halves").split(1)).uniform(TOKENS).argsort(1)
    error = np.full((3, TOKENS), np.nan)
    for half in (order[:, :13], order[:, 13:]):
        mask = torch.zeros(3, TOKENS, dtype=torch.bool).scatter_(1, half, True)
        predicted = equations.numbers(head(encoder.forward_views([view], [mask.unflatten(1, (3, 3, 3))])[0].tokens))
        rows = [(b, n) for b in range(3) for n in half[b].tolist() if got.body[b, n]]
        logits = np.stack([whole[b, n] for b, n in rows])
        softened = equations.softmax(logits / temperature)
        targets = softened if kind is IBOT else equations.sinkhorn(logits, temperature)
        for (b, n), target in zip(rows, targets, strict=True):
            error[b, n] = equations.cross_entropy(target, predicted[b, n] / 0.1)
    for b in range(3):
        chosen = got.body[b].numpy()
        wanted = (error[b] - error[b, chosen].mean()) / error[b, chosen].std()
        np.testing.assert_allclose(got.scores[b].numpy()[chosen], wanted[chosen], rtol=1e-3, atol=2e-3)


@every_masked
def test_masked_recipe__attention_without_a_class_token_is_refused_when_it_is_built(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "ViT", partial(ViT, class_token=False))
    with pytest.raises(ValueError, match=r"mask_score is attention, but this ViT has no \[CLS\].*another mask_score"):
        recipes.build(kind, mask_score="attention")
    recipes.build(kind, mask_score="loss")


@every_masked
def test_masked_recipe__teacher_is_built_where_it_is_needed(kind: type[PretrainModule]) -> None:
    distils = recipes.build(kind).has_teacher
    for score in SCORES:
        module = recipes.build(kind, mask_score=score)
        assert module.has_teacher == (distils or score in TEACHER_SCORES)
        kept = module.teacher if module.has_teacher else module.student
        assert module.backbone is cast(Any, kept)["backbone"]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(SimMIM, {"mask_score": "region"}), (IBOT, {"mask_score": "region"}), (DINO, {"views": {"centres": "regions"}})],
    ids=["SimMIM", "IBOT", "DINO"],
)
def test_recipe__that_needs_regions_is_refused_before_the_first_batch_of_data_without(
    kind: Any, settings: dict[str, Any], tiny_cache: Path
) -> None:
    module = recipes.build(kind, **settings)
    with pytest.raises(
        ValueError, match=rf"{kind.__name__}: batches have no region maps.*agssd regions.*data\.regions"
    ):
        recipes.trainer().fit(module, recipes.data_module(tiny_cache, regions=False))
    recipes.trainer(max_steps=1).fit(module, recipes.data_module(tiny_cache))
