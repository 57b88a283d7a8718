"""The line of checkpoints of a run: between two steps, whatever the accumulation; what is kept; random states."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from agssd.callbacks.run_checkpoint import RunCheckpoint, random_states, set_random_states
from agssd.run.checkpoints import newest_checkpoint


class Noisy(pl.LightningModule):
    """Fits noise that it draws from every global random state, so that it ends elsewhere if one of them is lost."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.starts: list[tuple[int, int]] = []
        self.log_value = 0.0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        noise = torch.rand(()) + float(np.random.rand()) + random.random()
        self.log("loss_of_step", self.log_value)
        return ((self.layer(batch[0]) - noise) ** 2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Stream(pl.LightningDataModule):
    """The same four samples for ever, cut as the trainer asks."""

    global_batch_size = 4

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        size = 4 // self.trainer.accumulate_grad_batches
        data = TensorDataset(torch.randn(4000, 4, generator=torch.Generator().manual_seed(1)))
        first = self.trainer.global_step * 4
        return DataLoader(torch.utils.data.Subset(data, range(first, 4000)), batch_size=size)


def fit(
    folder: Path | str, steps: int, accumulate: int = 1, stop: int | None = None, plugins: Any = None, **given: Any
) -> tuple[Any, Any]:
    """Train on from the newest checkpoint of ``folder``; fail in the backward pass after ``stop`` micro-batches."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(5)
    keep = RunCheckpoint(dirpath=str(folder), **({"every_n_train_steps": 2} | given))
    module = Noisy()
    if stop is not None:
        left = [stop]

        def count() -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyError("the power fails")

        module.on_after_backward = count  # type: ignore[method-assign]
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[keep], accumulate_grad_batches=accumulate, default_root_dir=folder,
        plugins=plugins,
    )  # fmt: skip
    found = newest_checkpoint(str(folder))
    arguments = {"ckpt_path": found[0], "weights_only": True} if found else {}
    trainer.fit(module, datamodule=Stream(), **arguments)
    return module, keep


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    return found


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("stop", [2.5, 3.75, 4.25, 7.0])
def test_run_checkpoint__interrupted_in_a_step_it_goes_on_with_every_random_state(
    tmp_path: Path, accumulate: int, stop: float
) -> None:
    fit(tmp_path / "whole", 8, accumulate)
    with pytest.raises(KeyError):
        fit(tmp_path / "cut", 8, accumulate, stop=int(stop * accumulate))
    with pytest.raises(KeyError):  # and again before the next save
        fit(tmp_path / "cut", 8, accumulate, stop=max(accumulate // 2, 1))
    saved = torch.load(tmp_path / "cut/last.ckpt", weights_only=True)
    assert saved["global_step"] == 2 * (int(stop * accumulate) // accumulate // 2)  # nothing of a step under way
    fit(tmp_path / "cut", 8, accumulate)
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "cut")[name], tensor), name


def test_run_checkpoint__another_accumulation_takes_the_same_samples_per_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    plain = Noisy.training_step

    def step(self: Noisy, batch: list[Tensor], batch_idx: int) -> Tensor:
        counted.append(len(batch[0]))
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(Noisy, "training_step", step)
    for number, cuts in enumerate(([(3, 4), (5, 1), (8, 2)], [(3, 1), (8, 4)])):
        before = 0
        for steps, accumulate in cuts:
            counted.clear()
            fit(tmp_path / str(number), steps, accumulate)
            assert counted == [4 // accumulate] * ((steps - before) * accumulate)
            before = steps


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [8, 9]),
        ({"keep_last": 1}, [9]),
        ({"keep_last": 3}, [6, 8, 9]),
        ({"keep_last": -1}, [2, 4, 6, 8, 9]),
    ],
)
def test_run_checkpoint__keeps_the_newest_and_calls_the_last_of_them_last(
    tmp_path: Path, settings: dict[str, Any], kept: list[int]
) -> None:
    fit(tmp_path, 9, **settings)
    assert names(tmp_path) == ["last.ckpt", *(f"step{step:08d}.ckpt" for step in kept)]
    assert (tmp_path / "last.ckpt").samefile(tmp_path / "step00000009.ckpt")


def test_run_checkpoint__keeps_the_best_by_a_metric_besides_also_over_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, values = Noisy.training_step, {2: 5.0, 4: 1.0, 6: 3.0, 8: 2.0, 10: float("nan")}

    def step(self: Noisy, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.log_value = values.get(self.trainer.global_step + 1, 9.0)
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(Noisy, "training_step", step)
    settings: dict[str, Any] = {"monitor": "loss_of_step", "keep_last": 1, "save_top_k": 2}
    with pytest.raises(KeyError):
        fit(tmp_path, 10, stop=5, **settings)
    _, keep = fit(tmp_path, 10, **settings)
    assert names(tmp_path) == ["last.ckpt", *(f"step{step:08d}.ckpt" for step in (4, 8, 10))]
    assert Path(keep.best_model_path).name == "step00000004.ckpt"


@pytest.mark.parametrize("stop", [3, 5])
def test_run_checkpoint__gradient_scaler_goes_on_where_it_was(tmp_path: Path, stop: int) -> None:
    def scaled() -> MixedPrecision:
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3))

    fit(tmp_path / "whole", 8, plugins=[scaled()])
    with pytest.raises(KeyError):
        fit(tmp_path / "cut", 8, stop=stop, plugins=[scaled()])
    state = torch.load(tmp_path / "cut/last.ckpt", weights_only=True)["MixedPrecision"]
    assert (state["scale"], state["_growth_tracker"]) == {3: (16.0, 2), 5: (32.0, 1)}[stop]
    fit(tmp_path / "cut", 8, plugins=[scaled()])
    whole, cut = (torch.load(tmp_path / run / "last.ckpt", weights_only=True) for run in ("whole", "cut"))
    assert cut["MixedPrecision"] == whole["MixedPrecision"] and whole["MixedPrecision"]["scale"] == 64.0
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(cut["state_dict"][name], tensor), name


def test_run_checkpoint__at_an_address_it_keeps_resumes_and_sets_aside_alike(tmp_path: Path) -> None:
    fit(tmp_path / "whole", 9)
    store, folder = fsspec.filesystem("memory"), "memory://resumed/checkpoints"

    def stored() -> list[str]:
        return sorted(name.rpartition("/")[2] for name in store.ls("/resumed/checkpoints", detail=False))

    with pytest.raises(KeyError):
        fit(folder, 9, stop=5)
    assert stored() == ["last.ckpt", "step00000002.ckpt", "step00000004.ckpt"]
    with store.open("/resumed/checkpoints/step00000006.ckpt", "wb") as torn:
        torn.write(b"half")
    fit(folder, 9)
    assert stored() == ["last.ckpt", "step00000006.ckpt.aside", "step00000008.ckpt", "step00000009.ckpt"]
    found = newest_checkpoint(folder)
    assert found is not None and found[1]["global_step"] == 9
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(found[1]["state_dict"][name], tensor), name


def test_run_checkpoint__what_is_later_than_where_it_goes_on_is_set_aside(tmp_path: Path) -> None:
    fit(tmp_path, 6, keep_last=-1)
    torn = tmp_path / "step00000006.ckpt"
    (tmp_path / "last.ckpt").unlink()
    torn.write_bytes(torn.read_bytes()[:1000])
    (tmp_path / "step00000008.ckpt.tmp").touch()  # of a process that was killed
    with pytest.raises(KeyError):
        fit(tmp_path, 6, stop=1, keep_last=-1)
    assert names(tmp_path) == ["last.ckpt", "step00000002.ckpt", "step00000004.ckpt", "step00000006.ckpt.aside"]
    assert (tmp_path / "last.ckpt").samefile(tmp_path / "step00000004.ckpt")


def test_run_checkpoint__keeping_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"checkpoint.keep_last is 0; give at least 1"):
        RunCheckpoint(keep_last=0)


def test_random_states__are_plain_data_and_bring_every_draw_back(tmp_path: Path) -> None:
    np.random.randn()  # numpy holds a second normal number back
    torch.save(random_states(), tmp_path / "states")
    first = [torch.rand(3).tolist(), np.random.randn(3).tolist(), random.random()]
    set_random_states(torch.load(tmp_path / "states", weights_only=True))
    assert [torch.rand(3).tolist(), np.random.randn(3).tolist(), random.random()] == first
