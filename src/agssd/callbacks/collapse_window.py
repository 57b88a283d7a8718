"""What the collapse monitor collects for one report."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from agssd.callbacks.collapse_alarms import TERMS
from agssd.evaluation.collapse import (
    distribution_figures,
    distribution_sums,
    effective_rank,
    feature_std,
    min_distance,
    norm_outlier,
    off_diagonal_cosine,
)
from agssd.types import Observations

_NO_GRADIENT = 1e-12  # below which a term has none, and the ratio is that of the largest to it


def rows_of(observations: Observations) -> int:
    """Return the rows that one micro-batch brings to the figure that gets fewest; kinds without a row do not count."""
    kinds = (kind for term in TERMS for kind in (f"teacher_{term}", f"{term}_features"))
    values = (observations.get(kind) for kind in kinds)
    return min((len(value) for value in values if isinstance(value, Tensor) and len(value)), default=1)


class Window:
    """The samples of one report: sums of distributions, rows of features, sums of scalars; on the device, per rank."""

    def __init__(self, quota: int) -> None:
        self.quota = quota
        self.counts: dict[str, int] = {}
        self.num_prototypes: dict[str, int] = {}
        self.scalars: set[str] = set()
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, list[Tensor]] = {}
        self._last: dict[str, Tensor] = {}

    def copy(self) -> Window:
        """Return what is collected by now; tensors are shared, since none is changed in place."""
        other = Window(self.quota)
        other.counts, other.num_prototypes = dict(self.counts), dict(self.num_prototypes)
        other.scalars, other._sums, other._last = set(self.scalars), dict(self._sums), dict(self._last)
        other._rows = {term: list(rows) for term, rows in self._rows.items()}
        return other

    def state(self) -> dict[str, Any]:
        """Return everything collected, on the CPU and in types of plain data."""
        collected = {"sums": self._sums, "rows": self._rows, "last": self._last}
        held: dict[str, Any] = apply_to_collection(collected, Tensor, lambda tensor: tensor.cpu())
        return {**held, "counts": self.counts, "num_prototypes": self.num_prototypes, "scalars": sorted(self.scalars)}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over what :meth:`state` returned."""
        held = apply_to_collection(state, Tensor, lambda tensor: tensor.to(device))
        self._sums, self._rows, self._last = held["sums"], held["rows"], held["last"]
        self.counts, self.num_prototypes = held["counts"], held["num_prototypes"]
        self.scalars = set(held["scalars"])

    @property
    def full(self) -> bool:
        """Whether every kind has its rows."""
        return all(count >= self.quota for count in self.counts.values())

    def needs_more(self, rows: int, micro_batches_to_go: int) -> bool:
        """Return whether to collect: always once begun, else if the micro-batches still to come do not suffice."""
        return bool(self.counts) or micro_batches_to_go * rows < self.quota

    def collect(self, observations: Observations) -> None:
        """Add one micro-batch."""
        tensors = {key: value.detach() for key, value in observations.items() if isinstance(value, Tensor)}
        for term in TERMS:
            if f"teacher_{term}" in tensors and f"student_{term}" in tensors:
                teacher, student = tensors[f"teacher_{term}"], tensors[f"student_{term}"]
                self.num_prototypes[term] = teacher.shape[-1]
                picked = self._pick(f"{term}_outputs", teacher)
                self._add(term, distribution_sums(teacher[picked], student[picked]))
            if f"{term}_features" in tensors:
                features = tensors[f"{term}_features"]
                self._rows.setdefault(term, []).append(features[self._pick(f"{term}_features", features)].float())
            if f"centre_norm_{term}" in tensors:
                self._last[f"{term}_centre_norm"] = tensors[f"centre_norm_{term}"]
        for name, value in observations.get("scalars", {}).items():
            value = value.detach().float()
            self.scalars.add(name)
            self._add(f"scalar {name}", torch.stack([value.nan_to_num(0.0, 0.0, 0.0), value.isfinite().float()]))

    def _add(self, name: str, sums: Tensor) -> None:
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def _pick(self, kind: str, values: Tensor) -> Tensor:
        """Return the rows to take: all, or as many as are still missing, spread evenly over the batch."""
        have = self.counts.get(kind, 0)
        take = min(len(values), self.quota - have)
        self.counts[kind] = have + take
        return torch.arange(take, device=values.device) * len(values) // max(take, 1)

    def figures(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Tensor]:
        """Return every figure over all ranks, on the device; every rank must observe the same kinds of tensors."""
        figures: dict[str, Tensor] = {}
        for name in sorted(self._sums):
            sums = trainer.strategy.reduce(self._sums[name], reduce_op="sum")
            assert isinstance(sums, Tensor)
            if name in TERMS:
                figures |= {f"{name}_{key}": value for key, value in distribution_figures(sums).items()}
            else:
                figures[name.removeprefix("scalar ")] = sums[0] / sums[1]
        norms = [value for name, value in figures.items() if name.startswith("grad_norm_")]
        if len(norms) > 1:
            self.scalars.add("grad_norm_ratio")
            figures["grad_norm_ratio"] = torch.stack(norms).max() / torch.stack(norms).min().clamp_min(_NO_GRADIENT)
        for term in sorted(self._rows):
            features = self._gathered(trainer, module, torch.cat(self._rows[term]))
            if len(features) >= 2:
                figures[f"{term}_feature_std"] = feature_std(features)
                figures[f"{term}_effective_rank"] = effective_rank(features)
                figures[f"{term}_cosine"] = off_diagonal_cosine(features)
                figures[f"{term}_norm_outlier"] = norm_outlier(features)
                if term == "cls":
                    figures["cls_min_distance"] = min_distance(features)
        return figures | self._last

    def _gathered(self, trainer: pl.Trainer, module: pl.LightningModule, rows: Tensor) -> Tensor:
        if trainer.world_size == 1:
            return rows
        padded = torch.cat([rows, rows.new_zeros(self.quota - len(rows), rows.shape[1])])
        counts = module.all_gather(torch.tensor([len(rows)], device=rows.device))
        gathered = module.all_gather(padded)
        assert isinstance(counts, Tensor) and isinstance(gathered, Tensor)
        return torch.cat([part[:size] for part, size in zip(gathered, counts.flatten().tolist(), strict=True)])
