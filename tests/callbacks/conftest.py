"""A small module that speaks every protocol of the callbacks, and a quiet trainer on one CPU thread."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from agssd.callbacks.online_probe import OnlineProbe
from agssd.models.ema import update_ema
from agssd.models.vit import ViT


class Toy(pl.LightningModule):
    """Fits noise with a linear student; keeps a teacher, a mask ratio, observations and panels."""

    def __init__(
        self, observe: Callable[[int], dict[str, Any]] | None = None, panel: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.student = nn.Linear(4, 4)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.mask_ratio = (0.5, 0.5)
        self.observations: dict[str, Any] | None = None
        self.observe = observe
        self.panel = {} if panel is None else panel
        self.momenta: list[float] = []
        self.ratios_at_views: list[tuple[float, float]] = []
        self.student_after_step: list[Tensor] = []
        self.panels_asked: list[int] = []

    def update_teacher(self, momentum: float) -> None:
        self.momenta.append(momentum)
        self.student_after_step.append(self.student.weight.detach().clone())
        update_ema(self.student, self.teacher, momentum)

    def view_panel(self, index: int) -> dict[str, Any]:
        if index >= 2:
            raise IndexError(index)
        self.panels_asked.append(index)
        return self.panel

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.ratios_at_views.append(self.mask_ratio)
        return batch

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.observe is not None:
            self.observations = self.observe(batch_idx)
        return (self.student(batch[0]) - batch[0].roll(1, -1)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), lr=0.1)


class Plain(pl.LightningModule):
    """Speaks no protocol."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Encoding(Toy):
    """A toy with an encoder to probe."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ViT(patch_size=8, embed_dim=12, depth=1, num_heads=2)


class Labelled(pl.LightningDataModule):
    """Has label maps of two classes, so it says."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(4096, 4)), batch_size=2)

    def probe_set(self, *given: Any) -> Any:
        return SimpleNamespace(num_label_classes=2, num_targets=0)


class ScriptedProbe(OnlineProbe):
    """Finds the Dice that it is told for each step; ``after`` is called whenever it measures."""

    def __init__(self, dice: dict[int, float], after: Callable[[], None] = lambda: None, **settings: Any) -> None:
        super().__init__(readouts=["linear-seg"], **settings)
        self.dice, self.after = dice, after
        self.steps: list[int] = []

    def _measure(self, trainer: Any, module: Any, *given: Any) -> dict[str, float]:
        self.after()
        self.steps.append(trainer.global_step)
        return {"linear_seg_dice": self.dice.get(trainer.global_step, 0.0)}


@pytest.fixture
def scripted() -> Callable[..., tuple[ScriptedProbe, pl.LightningModule, pl.LightningDataModule]]:
    """Return a function that makes a scripted probe, a module it suits and labelled data."""

    def make(dice: dict[int, float] | None = None, **settings: Any) -> Any:
        return ScriptedProbe(dice or {}, **settings), Encoding(), Labelled()

    return make


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def toy() -> type[Toy]:
    return Toy


@pytest.fixture
def plain() -> type[Plain]:
    return Plain


@pytest.fixture
def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(4096, 4)), batch_size=2)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    def make(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
        defaults: dict[str, Any] = {
            "default_root_dir": tmp_path,
            "logger": pl.loggers.CSVLogger(tmp_path, name="", version=""),
            "max_epochs": -1,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        return pl.Trainer(**{**defaults, **settings}, callbacks=list(callbacks))

    return make
