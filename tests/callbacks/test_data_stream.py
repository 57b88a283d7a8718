"""The log says what each cache gave, under names that hold no path."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor

from agssd.callbacks.data_stream import DataStream
from agssd.data_modules.pretrain import PretrainDataModule


class Counter(L.LightningModule):
    """Counts the cases that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.cases: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.cases += batch["case"].tolist()
        return (self.weight - 1.0).square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_data_stream__figures_are_what_was_drawn(
    make_trainer: Callable[..., L.Trainer], make_cache: Callable[..., Path], tmp_path: Path, accumulate: int
) -> None:
    paths = [
        str(make_cache(tmp_path / f"Mueller{n}.h5", cases, (16, 16, 16), splits=["train"] * cases))
        for n, cases in enumerate((3, 2))
    ]
    data = PretrainDataModule(paths, (16, 16, 16), 4, num_workers=0, weights=[1.0, 3.0])
    module = Counter()
    settings = {"limit_val_batches": 0, "use_distributed_sampler": False, "accumulate_grad_batches": accumulate}
    make_trainer(DataStream(2), max_steps=6, **settings).fit(module, data)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("data/source0_samples")]
    assert [row["step"] for row in rows] == ["1", "3", "5"]
    for row in rows:
        drawn = torch.tensor(module.cases[: 4 * (int(row["step"]) + 1)])
        for source, (members, size) in enumerate(((drawn < 3, 3), (drawn >= 3, 2))):
            assert float(row[f"data/source{source}_samples"]) == int(members.sum())
            assert float(row[f"data/source{source}_passes"]) == pytest.approx(int(members.sum()) / size)
    assert "Mueller" not in (tmp_path / "metrics.csv").read_text()
    assert not any("replaced" in name for name in rows[0])  # nothing is ever replaced unless the user chose so


def test_data_stream__other_data_are_left_alone(
    plain: Any, loader: Any, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    trainer = make_trainer(DataStream(1), max_steps=2)
    trainer.fit(plain(), loader)
    assert not any(name.startswith("data/") for name in trainer.callback_metrics)


def test_data_stream__nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="data_stream.every_n_steps is 0"):
        DataStream(0)
