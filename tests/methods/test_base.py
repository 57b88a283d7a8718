"""What every recipe shares: groups of parameters, schedules as shares of the run, the thaw of the last layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import recipes
import torch

from agssd.methods.agssd import AGSSD
from agssd.methods.base import gradient_norms
from agssd.methods.mae import MAE
from agssd.types import LossTerms

STEPS, THAW = 200, 10


class Watch(recipes.Recorder):
    """Also keeps the prototypes after every step, the schedules in force, and gradients of chosen parts."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes: list[torch.Tensor] = []
        self.schedules: list[dict[str, float]] = []
        self.fuser: list[float] = []
        self.last_layer: list[float] = []
        self.norms: list[tuple[float, float]] = []  # as judged, and of what the optimiser was given

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        heads = [pl_module.student[name].prototypes for name in ("cls_head", "patch_head")]
        self.prototypes.append(torch.cat([head.detach().clone() for head in heads]))
        self.schedules.append(
            {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("schedule/")}
        )
        self.fuser.append(sum(float(p.grad.norm()) for p in pl_module.student["fuser"].parameters()))
        self.last_layer.append(min(float("inf") if p.grad is None else float(p.grad.norm()) for p in heads))
        given = [p.grad.norm() for p in pl_module.student.parameters() if p.grad is not None]
        self.norms.append((float(pl_module.step_figures[1]), float(torch.stack(given).norm())))


@pytest.fixture(scope="module")
def run(tiny_cache: Path) -> tuple[AGSSD, Watch, torch.Tensor]:
    """Return a module trained for 200 steps with a thaw at 5 %, what was seen, and its first prototypes."""
    views = {"size_vox": (16, 16, 16), "num_local": 1, "local_size_vox": (8, 8, 8)}
    module = recipes.build(AGSSD, views, freeze_last_layer=THAW / STEPS)
    first = torch.cat([module.student[name].prototypes.detach().clone() for name in ("cls_head", "patch_head")])
    watch = Watch()
    data = recipes.data_module(tiny_cache, global_batch_size=1, parent_vox=(24, 24, 24))
    recipes.trainer(watch, max_steps=STEPS).fit(module, data)
    return module, watch, first


def test_run__last_layer_is_bit_identical_until_the_thaw_and_changed_after_it(run: Any) -> None:
    _, watch, first = run
    assert all(torch.equal(prototypes, first) for prototypes in watch.prototypes[:THAW])
    changed = (watch.prototypes[THAW] != first).any(1)
    assert changed.float().mean() > 0.9
    assert watch.last_layer[:THAW] == [float("inf")] * THAW, "a zero gradient would still decay the weights"
    assert min(watch.last_layer[THAW:]) > 0 and watch.last_layer[-1] < float("inf")


def test_run__the_norm_by_which_gradients_are_clipped_knows_nothing_of_frozen_prototypes(run: Any) -> None:
    for judged, given in run[1].norms:
        assert given == pytest.approx(min(judged, 3.0), rel=1e-5)


class Given(recipes.Recorder):
    """Keeps norm and largest entry of what the optimiser was given, and whether the guard has let go of it."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        gradients = [p.grad.flatten() for p in pl_module.student.parameters() if p.grad is not None]
        self.judged, self.norm = float(pl_module.step_figures[1]), float(torch.cat(gradients).norm())
        self.largest, self.held = float(torch.cat(gradients).abs().max()), pl_module.guard._judged


@pytest.mark.parametrize(
    ("value", "algorithm"), [(0.1, "norm"), (0.1, None), (1e-3, "value"), (None, None), (0.0, None), (-1.0, "norm")]
)
def test_configure_gradient_clipping__whatever_is_asked_for_and_nothing_is_kept(
    value: float | None, algorithm: str | None, tiny_cache: Path
) -> None:
    given = Given()
    settings = {"gradient_clip_val": value, "gradient_clip_algorithm": algorithm}
    recipes.trainer(given, teacher=False, max_steps=1, **settings).fit(
        recipes.build(MAE), recipes.data_module(tiny_cache, global_batch_size=2)
    )
    assert given.held is None, "a second set of gradients would stay in memory"
    assert given.judged > 0.2
    if algorithm == "value":
        assert given.largest == pytest.approx(1e-3)
    else:
        assert given.norm == pytest.approx(value if value and value > 0 else given.judged, rel=1e-5)


def test_run__every_schedule_leaves_its_start(run: Any) -> None:
    module, watch, _ = run
    start = module.schedules(0.0)
    assert {name.removeprefix("schedule/") for name in watch.schedules[0]} == set(start)
    assert all(watch.schedules[-1][f"schedule/{name}"] != value for name, value in start.items())
    end = module.schedules(1.0)
    assert end["fused_share"] == 0.5 and end["fused_share_cls"] == 0.1 and end["mask_edge_share"] == 0.5
    assert end["temperature_patch"] == pytest.approx(0.07) and end["mask_temperature"] == pytest.approx(1.0)
    assert end["weight_decay"] == pytest.approx(0.4) and end["lr"] == pytest.approx(1e-6)


def test_run__fuser_gets_gradient_once_it_has_weight(run: Any) -> None:
    _, watch, _ = run
    share = [given["schedule/fused_share"] for given in watch.schedules]
    assert share[0] == 0 and share[-1] == 0.5
    for weight, norm in zip(share, watch.fuser, strict=True):
        assert (norm > 0) == (weight > 0)


def test_run__weight_decay_follows_its_cosine_for_matrices_and_stays_zero_for_the_rest(run: Any) -> None:
    module, watch, _ = run
    decays = [group[0] for group in watch.decays]
    assert decays == sorted(decays) and decays[-1] == pytest.approx(0.4)
    assert 0.04 <= decays[0] < 0.0401
    assert all(group[1] == 0 for group in watch.decays)


def test_run__learning_rate_is_positive_at_the_first_step_and_warms_up_over_its_share(run: Any) -> None:
    module, watch, _ = run
    rates = [group[0] for group in watch.rates]
    assert rates[0] == pytest.approx(module.lr / (0.1 * STEPS))
    assert rates.index(max(rates)) == round(0.1 * STEPS) - 1 and max(rates) == pytest.approx(module.lr)
    assert all(first == second for first, second in watch.rates)


def test_configure_optimizers__decays_matrices_only() -> None:
    module = recipes.build(AGSSD)
    names = {id(p): name for name, p in module.student.named_parameters() if p.requires_grad}
    assert set(dict(module.student.named_parameters())) - set(names.values()) == {"backbone.mask_token"}, "not in use"
    decays, others = ({names[id(p)] for p in group["params"]} for group in module.configure_optimizers().param_groups)
    assert decays | others == set(names.values()) and not decays & others
    spared = ("bias", "token", "norm", "gain", "scale_", "norm1", "norm2")
    assert not [name for name in decays if any(word in name.rpartition(".")[2] for word in spared) or "norm" in name]
    assert {"backbone.cls_token", "decoder.mask_token", "backbone.norm.weight", "fuser.blocks.0.gain"} <= others
    assert {"backbone.patch_weight", "cls_head.prototypes", "fuser.blocks.0.memory.weight"} <= decays
    assert all(module.student.get_parameter(name).ndim >= 2 for name in decays)


def test_schedules__depend_on_the_share_of_the_run_alone(tiny_cache: Path) -> None:
    module = recipes.build(AGSSD)
    for name in set(module.schedules(0.0)) - {"temperature_cls"}:  # constant until a rollback lowers it
        values = [module.schedules(i / 50)[name] for i in range(51)]
        assert len(set(values)) > 2, f"{name} does not move"
    assert module.progress == 0.0


def test_drop_noise__is_each_samples_own_and_none_outside_training() -> None:
    module = recipes.build(AGSSD)
    both, local = module.drop_noise(torch.tensor([3, 4, 3]), 2, 1)
    assert both.shape == (6, 2) and local.shape == (3, 2)
    assert torch.equal(both[:2], both[4:]) and not torch.equal(both[:2], both[2:4]), "a function of the sample"
    assert not torch.equal(both[0], both[1]) and not torch.equal(local[0], both[0])
    assert module.eval().drop_noise(torch.tensor([3]), 2, 1) == [None, None]


def test_train__leaves_the_teacher_in_eval_mode() -> None:
    module = recipes.build(AGSSD).eval().train()
    assert module.student.training and not any(part.training for part in module.teacher.modules())


def test_validation__measures_and_moves_nothing(tiny_cache: Path) -> None:
    module = recipes.build(AGSSD)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trainer = recipes.trainer(limit_val_batches=1)
    trainer.validate(module, recipes.data_module(tiny_cache), verbose=False)
    first = dict(trainer.callback_metrics)
    assert {"val/loss", "val/loss_cls", "val/loss_patch", "val/loss_rec"} <= set(first)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())
    trainer.validate(module, recipes.data_module(tiny_cache), verbose=False)
    assert dict(trainer.callback_metrics) == first


def test_setup__an_encoder_that_cannot_compile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = recipes.build(AGSSD, compile=True)
    monkeypatch.delattr(type(module.student["backbone"]), "compile_blocks")  # leaves that of every encoder
    with pytest.raises(ValueError, match="cannot be compiled; set model.compile to false"):
        module.setup("fit")


def test_gradient_norms__are_those_of_the_weighted_terms_at_the_shared_outputs() -> None:
    shared = torch.tensor([3.0, 4.0], requires_grad=True)
    other = torch.ones(2, requires_grad=True)
    terms = {"near": shared.sum() + other.sum(), "far": (shared**2).sum() / 2, "off": shared.sum(), "none": other.sum()}
    loss = LossTerms(sum(terms.values(), torch.zeros(())), terms, (shared,))
    figures = gradient_norms(loss, {"far": 2.0, "off": 0.0})
    expected = {"grad_norm_near": 2**0.5, "grad_norm_far": 10.0}
    assert {name: float(value) for name, value in figures.items()} == pytest.approx(expected)
    assert shared.grad is None and other.grad is None
    assert gradient_norms(loss._replace(shared=()), {}) == {}


@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_norms__measuring_leaves_the_step_as_it_is(tiny_cache: Path, compiled: bool) -> None:
    batch = recipes.parents(tiny_cache, [0, 1])
    grads, figures = [], {}
    for measure in (False, True):
        module = recipes.build(AGSSD)
        if compiled:
            module.student["backbone"].compile_blocks("aot_eager")
        loss = module.pretrain_loss(module.on_after_batch_transfer(batch, 0))
        if measure:
            figures = gradient_norms(loss, module.weights)
        loss.total.backward()
        grads.append({name: p.grad for name, p in module.student.named_parameters() if p.grad is not None})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert set(figures) == {"grad_norm_cls", "grad_norm_patch", "grad_norm_rec", "grad_norm_align"}
    assert all(float(value) > 0 for value in figures.values())
