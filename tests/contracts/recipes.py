"""Every recipe of ``agssd.methods``, found by walking the package, and small runs of it for the contracts.

A recipe needs no entry here: what its constructor names decides what it is given.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import pkgutil
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

import agssd.methods
from agssd.callbacks.ema_teacher import EMATeacher
from agssd.data_modules.cache import VolumeCache
from agssd.data_modules.pretrain import PretrainDataModule
from agssd.methods.agssd import AGSSD
from agssd.methods.base import PretrainModule
from agssd.models.backbone import Backbone
from agssd.models.resnet_fpn import ResNetFPN
from agssd.models.swin_unetr import SwinUNETREncoder
from agssd.models.vit import ViT
from agssd.transforms.crops import OverlapCrops

PARENT = (32, 40, 32)
GLOBAL_BATCH = 4
# Given where a constructor names them; everything else keeps its default.
SMALL: dict[str, Any] = {
    "num_prototypes": 64,
    "head_hidden": 64,
    "predictor_hidden": 64,
    "num_regions": 8,
    "head_bottleneck": 32,
    "head_dim": 32,
    "fuser_heads": 3,
    "fuser_depth": 1,
    "decoder_dim": 48,
    "decoder_depth": 1,
    "decoder_heads": 3,
    "mask_block": 1,
    "lr": 1e-3,
}


# Second to the ViT, and without its [CLS]: windows that shift and that need padding.
SECOND = "swin"
THIRD = "resnet"  # a pyramid of convolutions, of which a cell of the last level reaches beyond a view of 24


def encoder(family: str, drop_path: float) -> Backbone:
    """Return a small encoder of 48 channels with tokens of 8 voxels; "vit", "swin" or "resnet"."""
    if family == SECOND:
        return SwinUNETREncoder(1, 24, 4, (2,), (2,), 3, 2.0, drop_path=drop_path)
    if family == THIRD:
        return ResNetFPN(1, "basic", (1, 1, 1), 8, 48, 8, 4, drop_path)
    return ViT(1, 8, depth=2, embed_dim=48, num_heads=3, drop_path=drop_path)


def find_recipes() -> list[type[PretrainModule]]:
    """Return every concrete subclass of PretrainModule that a module of ``agssd.methods`` defines."""
    found = []
    for info in pkgutil.walk_packages(agssd.methods.__path__, "agssd.methods."):
        for kind in vars(importlib.import_module(info.name)).values():
            if inspect.isclass(kind) and issubclass(kind, PretrainModule) and not inspect.isabstract(kind):
                if kind.__module__ == info.name:
                    found.append(kind)
    return sorted(found, key=lambda kind: kind.__name__)


def variants(kind: type[PretrainModule]) -> list[dict[str, Any]]:
    """Return ``{}`` and every alternative that the signature shows.

    Other choices of a ``Literal``, the other value of a bool, and 0.1 for a ``weight_*`` that is 0 by default; and the
    other families of encoders, unless the recipe refuses them.
    """
    hints = typing.get_type_hints(kind.__init__)
    found: list[dict[str, Any]] = [{}]
    for name, parameter in inspect.signature(kind).parameters.items():
        hint = hints.get(name)
        if typing.get_origin(hint) is typing.Literal:
            found += [{name: value} for value in typing.get_args(hint) if value != parameter.default]
        elif hint is bool and name != "compile":  # compiled blocks compute the same; see tests/models/test_vit.py
            found.append({name: not parameter.default})
        elif name.startswith("weight_") and parameter.default == 0:
            found.append({name: 0.1})
    if "backbone" in hints:
        given = ((family, needs(kind, family)) for family in (SECOND, THIRD))
        found += [{"backbone": family, **more} for family, more in given if more is not None]
    return found


def cases(alternatives: bool) -> list[tuple[type[PretrainModule], dict[str, Any]]]:
    """Return every recipe with its defaults, or with each of its alternatives."""
    return [(kind, variant) for kind in find_recipes() for variant in variants(kind) if bool(variant) == alternatives]


def needs(kind: type[PretrainModule], family: str) -> dict[str, Any] | None:
    """Return what a recipe is to be given for another family of encoders, as its refusal says; None: it takes none."""
    reason = refusal(kind, {}, family)
    if reason is None:
        return {}
    masked = {"student_views": "masked"}
    named = "student_views" in inspect.signature(kind).parameters and "student_views" in reason
    return masked if named and refusal(kind, masked, family) is None else None


def refusal(kind: type[PretrainModule], variant: dict[str, Any], family: str = SECOND) -> str | None:
    """Return why a variant does not take another family of encoders, or None if it does."""
    try:
        build(kind, **variant, backbone=family)
    except ValueError as error:
        return str(error)
    return None


def name_of(variant: dict[str, Any]) -> str:
    """Return a test's id for a variant."""
    return "-".join(str(value) for value in variant.values()) or "default"


def build(kind: type[PretrainModule], views: dict[str, Any] | None = None, **given: Any) -> Any:
    """Return a small module of the recipe, the same weights every time."""
    torch.manual_seed(0)
    named = inspect.signature(kind).parameters
    settings = {name: value for name, value in SMALL.items() if name in named} | given
    if "backbone" in named:
        settings["backbone"] = encoder(settings.get("backbone", "vit"), settings.pop("drop_path", 0.3))
    if settings.get("cvaa") == "casa":  # which fuses with whole views
        settings.setdefault("student_views", "masked")
    if "views" in named:
        default: dict[str, Any] = {"size_vox": (24, 24, 24), "scale": (0.6, 1.0), "num_local": 2}
        settings["views"] = OverlapCrops(**default | {"local_size_vox": (16, 16, 16)} | (views or {}))
    return kind(**settings)


def data_module(cache: Path, **given: Any) -> PretrainDataModule:
    """Return small parent crops of ``cache``, with regions where it has them."""
    settings: dict[str, Any] = {"parent_vox": PARENT, "global_batch_size": GLOBAL_BATCH, "num_workers": 0}
    settings["regions"] = all(info.num_regions is not None for info in VolumeCache(cache).cases)
    return PretrainDataModule(str(cache), **settings | given)


def parents(cache: Path, samples: list[int]) -> dict[str, Tensor]:
    """Return the batch of parent crops of these samples of the training stream."""
    data = data_module(cache)
    data.setup("validate")
    assert data.train_crops is not None
    batch: dict[str, Tensor] = default_collate([data.train_crops[sample] for sample in samples])
    return batch


class Recorder(L.Callback):
    """Keeps logged losses, learning rates and decays of every optimiser step, and the samples of every batch."""

    def __init__(self) -> None:
        self.losses: list[dict[str, float]] = []
        self.rates: list[list[float]] = []
        self.decays: list[list[float]] = []
        self.samples: list[list[int]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Some gradients are 0 but for rounding (biases of keys); Adam would blow them up to the size of a step.
        for group in trainer.optimizers[0].param_groups:
            group["eps"] = 3e-4

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.samples.append(batch.sample.tolist() if hasattr(batch, "sample") else [])
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:  # what is logged is the mean of the step by now
            metrics = trainer.callback_metrics.items()
            self.losses.append({name: float(value) for name, value in metrics if name.startswith("train/loss")})
            groups = trainer.optimizers[0].param_groups
            self.rates.append([group["lr"] for group in groups])
            self.decays.append([group["weight_decay"] for group in groups])


class States(L.Callback):
    """Keeps weights, buffers and the optimiser's moments after every micro-batch."""

    def __init__(self) -> None:
        self.found: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        kept = [value.flatten() for state in trainer.optimizers[0].state.values() for value in state.values()]
        state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.found.append(state | {"moments": torch.cat(kept) if kept else torch.zeros(0)})


def quiet() -> None:
    """Silence Lightning's advice, which is about other things than what is tested."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


@pytest.fixture(autouse=True, scope="module")
def quiet_and_on_one_thread() -> Iterator[None]:
    """Run a file on one thread, fixtures of the module included, so that figures do not depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    quiet()
    yield
    torch.set_num_threads(threads)


def trainer(*callbacks: L.Callback, teacher: bool = True, **given: Any) -> L.Trainer:
    """Return a quiet trainer on one CPU process with EMATeacher."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 3,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "limit_val_batches": 0,
        "gradient_clip_val": 3.0,
    }
    standing: list[L.Callback] = [EMATeacher(momentum_start=0.8)] if teacher else []
    return L.Trainer(**settings | given, callbacks=[*standing, *callbacks])


def short_run(kind: type[PretrainModule], variant: dict[str, Any], cache: Path, **given: Any) -> dict[str, Any]:
    """Return losses and state of a run of a few steps, however the batch is cut (``devices``, ``accumulate...``)."""
    module, record = build(kind, **variant), Recorder()
    trainer(record, **given).fit(module, data_module(cache))
    return {"losses": record.losses, "samples": record.samples, "state": module.state_dict()}


def assert_equal_runs(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Hold losses to 1e-5 (relative) and weights, EMA and centres to 1e-6."""
    assert len(first["losses"]) == len(second["losses"]) > 0
    for a, b in zip(first["losses"], second["losses"], strict=True):
        assert a.keys() == b.keys() and "train/loss" in a
        for name in a:
            assert abs(a[name] - b[name]) <= 1e-5 * max(1.0, abs(a[name])), f"{name}: {a[name]} and {b[name]}"
    assert first["state"].keys() == second["state"].keys()
    for name, tensor in first["state"].items():
        torch.testing.assert_close(
            second["state"][name], tensor, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def tensors(value: Any, path: str = "") -> dict[str, Tensor]:
    """Return every tensor inside dataclasses, tuples and dicts, by its path."""
    if isinstance(value, Tensor):
        return {path: value}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items: Any = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    elif isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (tuple, list)):
        items = ((str(i), part) for i, part in enumerate(value))
    else:
        return {}
    return {name: tensor for key, part in items for name, tensor in tensors(part, f"{path}.{key}").items()}


def take(batch: Any, rows: slice) -> Any:
    """Return the rows of a batch of parent crops."""
    return {name: tensor[rows] for name, tensor in batch.items()}


def build_whole(views: dict[str, Any] | None = None, **given: Any) -> Any:
    """Return a small AG-SSD whose student sees both views whole, one of them masked by a learned token."""
    form: dict[str, Any] = {
        "student_views": "both",
        "masked_views": 1,
        "mask_ratio": (0.3, 0.7),
        "distilled_share": 1.0,
    }
    if given.get("student_views") == "visible":  # what is left out must be as much of every sample
        form["mask_ratio"] = (0.7, 0.7)
    return build(AGSSD, views, **form | given)


def step_of(module: Any, batch: dict[str, Tensor]) -> tuple[Any, Any, Any]:
    """Return the views, the loss and what a step of AG-SSD left."""
    views = module.make_views(batch)
    loss = module.pretrain_loss(views)
    return views, loss, module._step
