"""Each alternative of CVAC, EAAM, CVAA and the objective is chosen from YAML alone, and changes loss and gradient."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import recipes
import torch
import yaml
from torch import Tensor

from agssd.lightning_cli import AgssdCLI
from agssd.methods.agssd import AGSSD
from agssd.methods.base import PretrainModule

CONF = Path(__file__).resolve().parents[2] / "conf"
NAMED = inspect.signature(AGSSD).parameters
SMALL: dict[str, Any] = {
    **{name: value for name, value in recipes.SMALL.items() if name in NAMED},
    **{"mask_score": "edge", "cvaa": "student", "assignment": "centring", "weight_koleo": 0.0},
}
VIEWS = {"size_vox": [32, 32, 32], "local_size_vox": [16, 16, 16], "num_local": 2, "scale": [0.6, 1.0]}
ENCODER = {"patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3, "drop_path": 0.3}
ALTERNATIVES: dict[str, dict[str, Any]] = {
    "entropy": {"model": {"mask_score": "entropy"}},
    "region": {"model": {"mask_score": "region"}},
    "teacher attention": {"model": {"mask_score": "attention"}},
    "teacher loss": {"model": {"mask_score": "loss"}},
    "random": {"model": {"mask_score": "random"}},
    "block": {"model": {"mask_score": "block"}},
    "one view masked": {"model": {"masked_views": 1}},
    "student sees masked views": {"model": {"student_views": "masked"}},
    "student sees both views": {"model": {"student_views": "both", "masked_views": 1, "mask_ratio": [0.3, 0.7]}},
    "no alignment": {"model": {"weight_align": 0.0}},
    "blurred places": {"model": {"align_pitches": 1.0}},
    "hidden blocks": {"model": {"mask_block": 2}},
    "hints": {"model": {"mask_hints": 0.3}},
    "cvaa teacher": {"model": {"cvaa": "teacher"}},
    "cvaa casa": {"model": {"cvaa": "casa", "student_views": "masked"}},
    "cvaa none": {"model": {"cvaa": "none"}},
    "a part of the hidden tokens": {"model": {"distilled_share": 0.5}},
    "plain patches": {"model": {"fused_share": 0.0}},
    "plain cls targets": {"model": {"fused_share_cls": 0.0}},
    "counterparts in sight": {"model": {"counterpart_drop": 0.0}},
    "no key dropout": {"model": {"key_dropout": 0.0}},
    "balance": {"model": {"assignment": "balance"}},
    "sinkhorn": {"model": {"assignment": "sinkhorn"}},
    "plain voxels": {"model": {"norm_pix": False}},
    "teacher sees appearance": {"model": {"clean_teacher": False}},
    "heads centred": {"model": {"head_centring": True}},
    "koleo": {"model": {"weight_koleo": 0.1}},
    "plain reconstruction": {"model": {"reconstruction_edges": 0.0}},
    "no appearance": {"model": {"appearance": {"prob_gamma": 0.0, "prob_histogram": 0.0, "prob_blur": 0.0}}},
    "all orientations": {"views": {"orientations": "all"}},
    "no flips": {"views": {"orientations": "none"}},
    "rotation": {"views": {"rotation_deg": 15.0}},
    "balanced centres": {"views": {"centres": "regions"}},
}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[dict[str, Any]], Any]]:
    """Return a function that builds the module which `agssd fit` would train, from YAML files."""
    built: list[AgssdCLI] = []
    folder = tmp_path_factory.mktemp("yaml")

    def from_yaml(alternative: dict[str, Any]) -> Any:
        base, over = folder / "base.yaml", folder / "over.yaml"
        backbone = {"class_path": "agssd.models.vit.ViT", "init_args": ENCODER}
        views = {"class_path": "agssd.transforms.crops.OverlapCrops", "init_args": VIEWS}
        data = {
            "class_path": "agssd.data_modules.pretrain.PretrainDataModule",
            "init_args": {"cache": "cache.h5", "parent_vox": [40, 48, 40], "global_batch_size": 4},
        }
        whole = {"model": str(CONF / "method/agssd.yaml"), "backbone": backbone, "views": views, "data": data}
        base.write_text(yaml.safe_dump({**whole, "trainer": {"accelerator": "cpu", "logger": False}}))
        groups = {"model": SMALL | alternative.get("model", {}), "views": alternative.get("views", {})}
        over.write_text(yaml.safe_dump({name: {"init_args": given} for name, given in groups.items() if given}))
        AgssdCLI(["fit", "--config", str(base), "--config", str(over)])
        return built.pop().model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AgssdCLI, "_run_subcommand", lambda self, subcommand: built.append(self))
        patch.setattr(PretrainModule, "progress", property(lambda self: 0.6))
        yield from_yaml


@pytest.fixture(scope="module")
def reference(build: Any, tiny_cache: Path) -> tuple[dict[str, Tensor], float, Tensor]:
    """Return weights of the base as if in the middle of a run, its loss and its gradient."""
    base = build({})
    weights = trained(base)
    return weights, *loss_and_gradient(base, weights, tiny_cache)


@pytest.fixture(scope="module")
def seen() -> dict[str, float]:
    """Collect the loss of every alternative."""
    return {}


def loss_and_gradient(module: Any, weights: dict[str, Tensor], cache: Path) -> tuple[float, Tensor]:
    """Return the loss and the gradient of the patch embedding, with ``weights`` where names and shapes agree."""
    own = module.state_dict()
    fitting = {name: tensor for name, tensor in weights.items() if name in own and own[name].shape == tensor.shape}
    assert len(fitting) > 50
    module.load_state_dict(fitting, strict=False)
    views = module.make_views(recipes.parents(cache, [0, 1, 2, 3]))
    with torch.no_grad():
        module.pretrain_loss(views)
    module.after_optimizer_step()  # what is centred, and how, shows in the step after
    loss = module.pretrain_loss(views).total
    loss.backward()
    gradient = module.student["backbone"].patch_weight.grad
    assert loss.isfinite() and gradient.isfinite().all()
    return float(loss.detach()), gradient


def trained(module: Any) -> dict[str, Tensor]:
    """Return weights with centres that have moved, a teacher that has left the student and a fuser that fuses."""
    noise = torch.Generator().manual_seed(3)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for name, tensor in state.items():
        if name.startswith(("teacher", "centre")) and not name.endswith((".mean", ".updates")):
            tensor += 0.02 * torch.randn(tensor.shape, generator=noise)
        if ".scale_" in name:
            tensor.fill_(1.0)
    return state


def test_agssd__same_yaml_and_seed_give_the_same_step(build: Any, reference: Any, tiny_cache: Path) -> None:
    weights, loss, gradient = reference
    again, same = loss_and_gradient(build({}), weights, tiny_cache)
    assert again == loss and torch.equal(same, gradient)


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_agssd__alternative_from_yaml_changes_loss_and_gradient(
    name: str, build: Any, reference: Any, seen: dict[str, float], tiny_cache: Path
) -> None:
    weights, loss, gradient = reference
    other, changed = loss_and_gradient(build(ALTERNATIVES[name]), weights, tiny_cache)
    assert abs(other - loss) > 1e-5 * loss
    assert float((changed - gradient).norm() / gradient.norm()) > 1e-3
    assert other not in seen.values(), f"equal to {[known for known, value in seen.items() if value == other]}"
    seen[name] = other


def test_agssd__alternatives_cover_every_choice_of_the_signature() -> None:
    choices = [variant for variant in recipes.variants(AGSSD) if variant and "backbone" not in variant]
    given = [{**SMALL, **alternative.get("model", {})} for alternative in ALTERNATIVES.values()] + [SMALL]
    for variant in choices:
        for name, value in variant.items():
            assert any(settings.get(name) == value for settings in given), f"{name}={value} is not tried"
