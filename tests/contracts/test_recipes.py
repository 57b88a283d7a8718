"""What every recipe of ``agssd.methods`` keeps; a new recipe is held to it without an entry here."""

from __future__ import annotations

import copy
import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import recipes
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import agssd.methods
from agssd.callbacks.ema_teacher import EMATeacher
from agssd.hub import export_backbone, load_backbone
from agssd.methods.base import PretrainModule
from agssd.models.vit import ViT
from agssd.types import Observable

RECIPES = recipes.find_recipes()
CASES = [(kind, variant) for kind in RECIPES for variant in recipes.variants(kind)]
every_recipe = pytest.mark.parametrize("kind", RECIPES, ids=lambda kind: kind.__name__)
NAMES = [f"{kind.__name__}-{recipes.name_of(variant)}" for kind, variant in CASES]
every_variant = pytest.mark.parametrize(  # of the families of encoders one besides the ViT is held to it at once
    ("kind", "variant"),
    [pytest.param(*case, marks=pytest.mark.slow if case[1].get("backbone") == recipes.THIRD else ()) for case in CASES],
    ids=NAMES,
)
every_variant_trained = pytest.mark.parametrize(  # what is not the default only in `make test-slow`
    ("kind", "variant"), [pytest.param(*case, marks=pytest.mark.slow if case[1] else ()) for case in CASES], ids=NAMES
)
ON_OTHERS = [
    pytest.param(kind, variant["backbone"], marks=pytest.mark.slow if variant["backbone"] == recipes.THIRD else ())
    for kind, variant in CASES
    if "backbone" in variant
]
ON_VIT = [(kind, variant) for kind, variant in CASES if "backbone" not in variant]
STEPS, RESUMED_AT = 24, 10
VOLUME = torch.randn(2, 1, 32, 24, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put modules without a trainer in the middle of their run, where every schedule has left its start."""
    monkeypatch.setattr(PretrainModule, "progress", property(lambda self: 0.6))


def test_find_recipes__finds_every_file_of_the_folder_with_its_alternatives() -> None:
    files = {path.stem for path in Path(agssd.methods.__path__[0]).glob("*.py")} - {"__init__", "base"}
    assert {kind.__module__.rpartition(".")[2] for kind in RECIPES} == files and "agssd" in files
    assert len(CASES) > 2 * len(RECIPES)


# ------------------------------------------------------------------ gradients


@every_variant
def test_recipe__every_trainable_parameter_gets_gradient_and_the_teacher_none(
    kind: type[PretrainModule], variant: dict[str, Any], tiny_cache: Path, halfway: None
) -> None:
    module = recipes.build(kind, **variant)
    module.pretrain_loss(module.make_views(recipes.parents(tiny_cache, [0, 1, 2, 3]))).total.backward()
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    assert trainable
    still = [name for name, p in trainable if p.grad is None or not p.grad.any()]
    assert not still, f"no gradient: {still}"
    assert all(p.grad.isfinite().all() for _, p in trainable)
    if module.has_teacher:
        assert all(p.grad is None and not p.requires_grad for p in module.teacher.parameters())


@every_variant
def test_recipe__first_step_leaves_no_parameter_out_of_the_graph(
    kind: type[PretrainModule], variant: dict[str, Any], tiny_cache: Path
) -> None:
    module = recipes.build(kind, **variant)
    module.pretrain_loss(module.make_views(recipes.parents(tiny_cache, [0, 1]))).total.backward()
    # Weights may be 0 at the start of a ramp; DDP needs a gradient all the same.
    assert not [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]


@every_variant
def test_recipe__loss_in_bfloat16_is_within_two_percent(
    kind: type[PretrainModule], variant: dict[str, Any], tiny_cache: Path, halfway: None
) -> None:
    module = recipes.build(kind, **variant)
    views = module.make_views(recipes.parents(tiny_cache, [0, 1, 2, 3]))
    with torch.no_grad():
        exact = module.pretrain_loss(views)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = module.pretrain_loss(views)
    assert rounded.total.dtype == torch.float32
    assert float(rounded.total) == pytest.approx(float(exact.total), rel=0.02)
    for name, value in exact.terms.items():
        assert rounded.terms[name].dtype == torch.float32
        assert float(rounded.terms[name]) == pytest.approx(float(value), rel=0.02, abs=2e-3), name


# Settings that would give NaN, divide by 0, or leave hidden tokens out of the loss without a word.
WRONG: dict[str, tuple[Any, ...]] = {
    "mask_ratio": ((0.7, 0.3), (-0.5, 0.5), (0.0, 0.0), (1.0, 1.0), (0.5, 1.5)),
    "mask_block": (0, -1, 2),  # of a grid of 3
    "mask_temperature": ((4.0, 0.0),),
    "temperature": (0.0,),
    "temperature_student": (0.0, -1.0),
    "temperature_teacher": ((0.0, 0.07),),
    "temperature_patch": ((0.04, -1.0),),
    "contrast_temperature": (0.0,),
    "transport_temperature": (0.0,),
    "num_prototypes": (0,),
    "head_hidden": (0,),
    "head_bottleneck": (0,),
    "head_dim": (0,),
    "points_per_axis": (0,),
    "num_regions": (0,),
    "num_scales": (0,),
    "core_cells": (0,),
    "predictor_hidden": (0,),
    "min_share": (1.0, -0.1),
    "crop_scale": (0.0, -1.0),
    "prob_paint": (-0.1, 1.5),
}


@every_recipe
def test_recipe__settings_out_of_range_are_refused_by_name_when_it_is_built(kind: type[PretrainModule]) -> None:
    recipes.build(kind)
    for name in WRONG.keys() & inspect.signature(kind).parameters.keys():
        for value in WRONG[name]:
            with pytest.raises(ValueError, match=name.replace("_", "[_ ]")):
                recipes.build(kind, **{name: value})


# ------------------------------------------------------------------ the run


@pytest.fixture(scope="module")
def runs(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that trains a recipe once per module of tests: module, record, folder of checkpoints."""
    done: dict[type[PretrainModule], Any] = {}

    def run(kind: type[PretrainModule]) -> Any:
        if kind not in done:
            folder = tmp_path_factory.mktemp(kind.__name__)
            module, record = recipes.build(kind), recipes.Recorder()
            keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_weights_only=False)
            settings: dict[str, Any] = {"enable_checkpointing": True, "default_root_dir": folder}
            recipes.trainer(record, keep, max_steps=STEPS, **settings).fit(module, recipes.data_module(tiny_cache))
            done[kind] = (module, record, folder)
        return done[kind]

    return run


@every_recipe
def test_recipe__losses_are_finite_at_every_step(kind: type[PretrainModule], runs: Any) -> None:
    _, record, _ = runs(kind)
    assert len(record.losses) == STEPS
    assert all(math.isfinite(value) for step in record.losses for value in step.values())


@every_variant_trained
def test_recipe__loss_falls_while_targets_stand_still(
    kind: type[PretrainModule], variant: dict[str, Any], tiny_cache: Path, halfway: None
) -> None:
    module = recipes.build(kind, **variant)
    views = module.make_views(recipes.parents(tiny_cache, [0, 1, 2, 3]))
    optimiser = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(16):
        loss = module.pretrain_loss(views)
        losses.append({"total": loss.total.item()} | {name: term.item() for name, term in loss.terms.items()})
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
    if not variant:  # a regulariser that a variant adds may rise against the rest
        assert all(losses[-1][name] < losses[0][name] for name in losses[0])
    assert losses[-1]["total"] < 0.9 * losses[0]["total"]


@every_recipe
def test_recipe__first_step_has_a_learning_rate_and_last_the_lowest(kind: type[PretrainModule], runs: Any) -> None:
    module, record, _ = runs(kind)
    assert record.rates[0][0] > 0
    assert max(rate for rates in record.rates for rate in rates) == pytest.approx(module.lr, rel=0.02)
    assert record.rates[-1] == pytest.approx([module.min_lr] * len(record.rates[-1]), rel=1e-6)


@every_recipe
def test_recipe__interrupted_and_resumed_equals_undisturbed(
    kind: type[PretrainModule], runs: Any, tiny_cache: Path
) -> None:
    whole, record, folder = runs(kind)
    resumed, again = recipes.build(kind), recipes.Recorder()
    for parameter in resumed.parameters():
        parameter.data.zero_()  # nothing may come from the new module
    path = folder / f"step={RESUMED_AT}.ckpt"
    data = recipes.data_module(tiny_cache)
    recipes.trainer(again, max_steps=STEPS).fit(resumed, data, ckpt_path=path, weights_only=True)
    assert again.samples == record.samples[RESUMED_AT:]
    assert again.losses == record.losses[RESUMED_AT:]
    assert again.rates == record.rates[RESUMED_AT:], "the learning rate starts anew"
    assert again.decays == record.decays[RESUMED_AT:]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "variant"),
    [case for case in CASES if case[1]],
    ids=[name for name, case in zip(NAMES, CASES, strict=True) if case[1]],
)
def test_recipe__alternatives_resume_too(
    kind: type[PretrainModule], variant: dict[str, Any], tiny_cache: Path, tmp_path: Path
) -> None:
    whole, record = recipes.build(kind, **variant), recipes.Recorder()
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_weights_only=False)
    data = recipes.data_module(tiny_cache)
    recipes.trainer(record, keep, enable_checkpointing=True, default_root_dir=tmp_path).fit(whole, data)
    resumed, again = recipes.build(kind, **variant), recipes.Recorder()
    for tensor in resumed.state_dict().values():
        tensor.zero_()
    path = tmp_path / "step=1.ckpt"
    recipes.trainer(again).fit(resumed, recipes.data_module(tiny_cache), ckpt_path=path, weights_only=True)
    assert len(again.losses) == 2 and again.losses == record.losses[1:]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@every_recipe
def test_recipe__checkpoint_is_data_only_and_exports_to_equal_features(
    kind: type[PretrainModule], runs: Any, tmp_path: Path
) -> None:
    module, _, folder = runs(kind)
    path = folder / f"step={STEPS}.ckpt"
    saved = torch.load(path, weights_only=True)
    assert saved["agssd"]["method"] == f"{kind.__module__}.{kind.__name__}"
    assert saved["agssd"]["contract"]["spacing_mm"] == [1.0, 1.0, 1.0]
    encoder = load_backbone(export_backbone(path, tmp_path))
    assert encoder.contract is not None and encoder.contract["modality"] == "mri"
    seen = encoder.contract["seen"]
    assert (seen["num_cases"], seen["num_subjects"]) == (5, 5)
    assert seen == saved["agssd"]["contract"]["seen"]
    beside = json.loads((tmp_path / "backbone.json").read_text())["seen"]
    assert beside == {name: seen[name] for name in ("num_cases", "num_subjects", "salts")}
    assert_same_features(encoder, module)
    if module.has_teacher:  # the teacher's, not the student's, features
        with torch.no_grad():
            assert not torch.allclose(module.student["backbone"](VOLUME).cls, encoder(VOLUME).cls, atol=1e-4)


def assert_same_features(encoder: Any, module: Any) -> None:
    """Hold an exported encoder to the one that its module keeps."""
    module.eval()
    with torch.no_grad():
        given, kept = encoder(VOLUME), module.backbone(VOLUME)
    for a, b in ((given.cls, kept.cls), (given.tokens, kept.tokens), *zip(given.levels, kept.levels, strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


# ------------------------------------------------------------------ other families of encoders


@pytest.mark.parametrize(("kind", "family"), ON_OTHERS)
def test_recipe__other_families_train_and_export_to_equal_features(
    kind: type[PretrainModule], family: str, tiny_cache: Path, tmp_path: Path
) -> None:
    module = recipes.build(kind, backbone=family, **(recipes.needs(kind, family) or {}))
    before = copy.deepcopy(module.backbone.state_dict())
    trainer = recipes.trainer(max_steps=2, default_root_dir=tmp_path)
    trainer.fit(module, recipes.data_module(tiny_cache))
    if isinstance(module, Observable):
        assert "attention" not in module.view_panel(0), "there is no [CLS]"
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    encoder = load_backbone(export_backbone(tmp_path / "last.ckpt", tmp_path))
    assert type(encoder) is type(module.backbone) and encoder.config == module.backbone.config
    assert any(not torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert_same_features(encoder, module)


@pytest.mark.parametrize(("kind", "variant"), ON_VIT, ids=[f"{k.__name__}-{recipes.name_of(v)}" for k, v in ON_VIT])
def test_recipe__refuses_the_second_family_before_the_run_exactly_where_it_needs_what_only_a_vit_has(
    kind: type[PretrainModule],
    variant: dict[str, Any],
    tiny_cache: Path,
    halfway: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used = []
    for name, needs in (("forward_visible", "cannot leave tokens out"), ("_cls_rows", r"no \[CLS\] token")):
        plain = getattr(ViT, name)
        monkeypatch.setattr(ViT, name, lambda *given, needs=needs, plain=plain: used.append(needs) or plain(*given))
    module = recipes.build(kind, **variant)
    with torch.no_grad():
        module.pretrain_loss(module.make_views(recipes.parents(tiny_cache, [0, 1])))
    reason = recipes.refusal(kind, variant)
    assert (reason is not None) == bool(used), f"uses {used}, and a Swin is refused because of {reason}"
    if reason is not None:
        assert any(re.search(needs, reason) for needs in used) and "use a ViT" in reason


# ------------------------------------------------------------------ teacher


def with_teacher(kind: type[PretrainModule]) -> Any:
    """Return a module of the recipe's first variant that has a teacher, or skip."""
    modules = (recipes.build(kind, **variant) for variant in recipes.variants(kind))
    found = next((module for module in modules if module.has_teacher), None)
    return found if found is not None else pytest.skip("no teacher")


@every_recipe
def test_recipe__teacher_starts_equal_and_moves_once_per_optimiser_step(
    kind: type[PretrainModule], tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = with_teacher(kind)
    student, teacher = module.student.state_dict(), module.teacher.state_dict()
    assert student.keys() == teacher.keys() and len(student) > len(module.backbone.state_dict())
    assert all(torch.equal(student[name], teacher[name]) for name in student)
    in_optimiser = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert in_optimiser == {id(p) for p in module.student.parameters() if p.requires_grad}

    expected = copy.deepcopy(module.teacher)
    updates: list[float] = []
    update = module.update_teacher

    def spy(momentum: float) -> None:
        updates.append(momentum)
        for own, other in zip(expected.parameters(), module.student.parameters(), strict=True):
            own.mul_(momentum).add_(other.detach(), alpha=1 - momentum)
        update(momentum)

    monkeypatch.setattr(module, "update_teacher", spy)
    recipes.trainer(max_steps=2, accumulate_grad_batches=4).fit(module, recipes.data_module(tiny_cache))
    assert updates == pytest.approx([EMATeacher(0.8).momentum(step, 2) for step in (1, 2)])
    for own, other in zip(module.teacher.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-6)
    assert not module.teacher.training and module.student.training


@every_recipe
def test_recipe__run_without_a_callback_that_moves_the_teacher_is_refused(
    kind: type[PretrainModule], tiny_cache: Path
) -> None:
    module = with_teacher(kind)
    with pytest.raises(ValueError, match="no callback moves it; add .*EMATeacher"):
        recipes.trainer(teacher=False).fit(module, recipes.data_module(tiny_cache))


# ------------------------------------------------------------------ the cut of the batch


@every_recipe
def test_recipe__same_seed_gives_same_views_however_the_batch_is_cut(
    kind: type[PretrainModule], tiny_cache: Path
) -> None:
    module = recipes.build(kind)
    batch = recipes.parents(tiny_cache, [5, 6, 7, 8])
    whole = recipes.tensors(module.make_views(batch))
    assert whole
    torch.manual_seed(99)  # torch's global stream plays no part
    again = recipes.tensors(module.make_views(batch))
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    parts = [recipes.tensors(module.make_views(recipes.take(batch, slice(i, i + 1)))) for i in range(4)]
    for name, tensor in whole.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), tensor, rtol=0, atol=1e-5)
    other = recipes.tensors(recipes.build(kind, seed=1).make_views(batch))
    assert any(not torch.equal(other[name], whole[name]) for name in whole)


@every_variant_trained
def test_recipe__accumulating_four_micro_batches_equals_one_batch_unless_declared(
    kind: type[PretrainModule], variant: dict[str, Any], tiny_cache: Path
) -> None:
    whole = recipes.short_run(kind, variant, tiny_cache)
    cut = recipes.short_run(kind, variant, tiny_cache, accumulate_grad_batches=4)
    assert [len(samples) for samples in cut["samples"]] == [1] * 12
    coupled = recipes.build(kind, **variant).couples_samples
    if not coupled:
        recipes.assert_equal_runs(whole, cut)
        return
    about = [text for text in (kind.__doc__ or "").lower().split("\n\n") if "accumulation" in text]
    for name in coupled:
        assert any(name in text for text in about), f"the docstring does not say that accumulation changes {name}"
    with pytest.raises(AssertionError):  # a declaration without need would hide a defect
        recipes.assert_equal_runs(whole, cut)


# ------------------------------------------------------------------ known defects of the family


@every_recipe
def test_recipe__clipping_is_effective_under_bfloat16(kind: type[PretrainModule], tiny_cache: Path) -> None:
    class Norms(recipes.L.Callback):
        before: float
        after: float

        def _norm(self, module: Any) -> float:
            return float(torch.stack([p.grad.norm() for p in module.student.parameters() if p.grad is not None]).norm())

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.before = self._norm(pl_module)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.after = self._norm(pl_module)

    norms = Norms()
    settings: dict[str, Any] = {"precision": "bf16-mixed", "gradient_clip_val": 0.01, "max_steps": 2}
    recipes.trainer(norms, **settings).fit(recipes.build(kind), recipes.data_module(tiny_cache))
    assert norms.before > 0.1
    assert norms.after == pytest.approx(0.01, rel=1e-3)
