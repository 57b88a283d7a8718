"""The dashboard collects enough samples over steps and ranks, and each way to collapse raises its own alarm."""

from __future__ import annotations

import csv
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from agssd.callbacks.collapse_monitor import CollapseMonitor
from agssd.evaluation.collapse import distribution_figures, distribution_sums, effective_rank, feature_std

K, E = 32, 24


def _healthy(step: int, rows: int = 16) -> dict[str, Tensor]:
    """Distinct, sharp outputs over all prototypes and isotropic features."""
    generator = torch.Generator().manual_seed(step)
    logits = torch.randn(rows, K, generator=generator)
    observed: dict[str, Tensor] = {"scalars": {"gap": torch.tensor(float(step))}}
    for term in ("cls", "patch"):
        observed[f"teacher_{term}"] = (4 * logits).softmax(-1)
        observed[f"student_{term}"] = logits
        observed[f"{term}_features"] = torch.randn(rows, E, generator=generator)
        observed[f"centre_norm_{term}"] = torch.tensor(0.5)
    return observed


def _rows(folder: Path) -> list[dict[str, float]]:
    with open(folder / "metrics.csv", newline="") as file:
        table = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    reports = [row for row in table if "collapse/alarms" in row]
    return [{name.removeprefix("collapse/"): float(value) for name, value in row.items()} for row in reports]


def _run(toy, loader, make_trainer, observe, monitor, steps=40, **settings):
    module = toy(observe)
    trainer = make_trainer(monitor, max_steps=steps, **settings)
    trainer.fit(module, loader)
    return trainer


def test_collapse_monitor__figures_are_those_of_the_last_samples(toy, loader, make_trainer, tmp_path) -> None:
    _run(toy, loader, make_trainer, _healthy, CollapseMonitor(10, 64), steps=20)
    rows = _rows(tmp_path)
    assert [row["step"] for row in rows] == [9, 19]
    for row, last in zip(rows, (9, 19), strict=True):
        window = [_healthy(step) for step in range(last - 3, last + 1)]  # 4 steps of 16 samples
        for term in ("cls", "patch"):
            sums = sum(distribution_sums(seen[f"teacher_{term}"], seen[f"student_{term}"]) for seen in window)
            features = torch.cat([seen[f"{term}_features"] for seen in window])
            for name, value in distribution_figures(sums).items():
                assert row[f"{term}_{name}"] == pytest.approx(float(value), rel=1e-5)
            assert row[f"{term}_samples"] == 64
            assert row[f"{term}_effective_rank"] == pytest.approx(float(effective_rank(features)), rel=1e-5)
            assert row[f"{term}_feature_std"] == pytest.approx(float(feature_std(features)), rel=1e-5)
            assert row[f"{term}_centre_norm"] == 0.5
        assert row["gap"] == pytest.approx(last - 1.5)
        assert row["alarms"] == 0


def test_collapse_monitor__few_rows_wait_over_reports_and_accumulation(toy, loader, make_trainer, tmp_path) -> None:
    monitor = CollapseMonitor(4, 12)
    _run(toy, loader, make_trainer, lambda step: _healthy(step, 1), monitor, 12, accumulate_grad_batches=2)
    assert [(row["step"], row["cls_samples"]) for row in _rows(tmp_path)] == [(7, 12)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_collapse_monitor__asks_the_module_only_when_it_needs_rows(toy, loader, make_trainer, accumulate: int) -> None:
    asked: list[int] = []

    class Counting(toy):
        in_batch = -1

        def training_step(self, batch, batch_idx):
            self.in_batch = batch_idx
            return super().training_step(batch, batch_idx)

        @property
        def observations(self):
            if self.in_batch >= 0:
                asked.append(self.in_batch)
            return _healthy(self.in_batch)

        @observations.setter
        def observations(self, value) -> None: ...

    monitor = CollapseMonitor(10, 32)  # two micro-batches of 16 rows
    make_trainer(monitor, max_steps=20, accumulate_grad_batches=accumulate).fit(Counting(), loader)
    last = 10 * accumulate - 1
    assert asked == [0, last - 1, last, 2 * last, 2 * last + 1]


def test_collapse_monitor__has_gradients_measured_in_reporting_steps_alone(toy, loader, make_trainer, tmp_path) -> None:
    measured: list[int] = []

    class Measuring(toy):
        measure_gradients = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            assert self.observations is not None
            if self.measure_gradients:
                measured.append(batch_idx)
                self.observations["scalars"] = {"grad_norm_cls": torch.tensor(float(batch_idx))}
            return loss

    trainer = make_trainer(CollapseMonitor(5, 48), max_steps=10, accumulate_grad_batches=2)
    trainer.fit(Measuring(lambda step: _healthy(step)), loader)
    assert measured == [8, 9, 18, 19]
    assert [row["grad_norm_cls"] for row in _rows(tmp_path)] == [8.5, 18.5]


@pytest.mark.parametrize(("norms", "rings"), [
    ((3.0, 0.0), True), ((3.0, 0.2), True), ((3.0, 0.4), False), ((0.0, 0.0), False), ((3.0, math.nan), False),
])  # fmt: skip
def test_collapse_monitor__a_term_that_decides_alone_rings_also_where_another_has_no_gradient(
    toy, loader, make_trainer, tmp_path, caplog, norms: tuple[float, float], rings: bool
) -> None:
    def observe(step: int) -> dict[str, Tensor]:
        shares = torch.tensor(norms) * (0.5 + step % 2)  # 1 in the mean of two micro-batches
        return _healthy(step) | {"scalars": {"grad_norm_cls": shares[0], "grad_norm_patch": shares[1]}}

    _run(toy, loader, make_trainer, observe, CollapseMonitor(10, 32, min_information=0), steps=10)
    told = [record.getMessage() for record in caplog.records if "one loss term decides alone" in record.getMessage()]
    assert len(told) == int(rings)
    (row,) = _rows(tmp_path)
    if norms[1] > 0:
        assert row["grad_norm_ratio"] == pytest.approx(norms[0] / norms[1])
    assert ("grad_norm_ratio" in row) == (norms[1] == norms[1])


def test_collapse_monitor__many_tokens_are_thinned_evenly(toy, loader, make_trainer, tmp_path) -> None:
    def observe(step: int) -> dict[str, Tensor]:
        position = torch.arange(1000.0)[:, None]
        return {"patch_features": torch.cat([torch.ones_like(position), 2 * (position >= 500)], 1)}

    _run(toy, loader, make_trainer, observe, CollapseMonitor(1, 10), steps=1)
    unit = torch.tensor([[1.0, 0.0], [0.2**0.5, 0.8**0.5]]).repeat_interleave(5, 0)
    assert _rows(tmp_path)[0]["patch_feature_std"] == pytest.approx(float(unit.std(0, correction=0).mean()) * 2**0.5)


def test_collapse_monitor__empty_terms_and_scalars_without_value_are_left_out(
    toy, loader, make_trainer, tmp_path, caplog
) -> None:
    def observe(step: int) -> dict[str, Tensor]:
        seen = _healthy(step)
        for key in ("teacher_patch", "student_patch", "patch_features"):
            seen[key] = seen[key][:0]
        seen["scalars"] = {"gap": torch.tensor(float("nan")), "psnr": torch.tensor(20.0)}
        return seen

    _run(toy, loader, make_trainer, observe, CollapseMonitor(10, 32, grace=0), steps=40)
    rows = _rows(tmp_path)
    assert [row["step"] for row in rows] == [19, 39]  # one turn of waiting for tokens that never come
    assert not any(name.startswith("patch_entropy") or name == "gap" for name in rows[0])
    assert rows[0]["psnr"] == 20 and rows[0]["alarms"] == 0
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def _uniform(step: int) -> dict[str, Tensor]:
    return {**_healthy(step), "teacher_cls": torch.full((16, K), 1 / K), "student_cls": torch.zeros(16, K)}


def _peaked(step: int) -> dict[str, Tensor]:
    return {**_healthy(step), "teacher_patch": torch.eye(K)[torch.arange(16) % 2]}


def _one_winner(step: int) -> dict[str, Tensor]:
    logits = torch.randn(16, K, generator=torch.Generator().manual_seed(step))
    logits[:12, 3] = 4
    return {**_healthy(step), "teacher_cls": logits.softmax(-1)}


def _constant(step: int) -> dict[str, Tensor]:
    fixed = torch.arange(K).div(16.0).softmax(-1)
    noisy = fixed.repeat(16, 1)
    noisy[torch.arange(16), torch.arange(16)] += 0.002
    return {**_healthy(step), "teacher_cls": noisy / noisy.sum(-1, keepdim=True)}


def _equal_features(step: int) -> dict[str, Tensor]:
    return {**_healthy(step), "cls_features": torch.ones(16, E) + 1e-3 * torch.randn(16, E)}


def _flat_features(step: int) -> dict[str, Tensor]:
    seen = _healthy(step)
    return {**seen, "patch_features": seen["patch_features"] * (torch.arange(E) < 4)}


def _tight_features(step: int) -> dict[str, Tensor]:
    seen = _healthy(step)
    return {**seen, "cls_features": seen["cls_features"] + 6}


def _broken(step: int) -> dict[str, Tensor]:
    seen = _healthy(step)
    seen["cls_features"][0, 0] = float("nan")
    return seen


WAYS = [
    (_uniform, "ERROR", "cls cross-entropy has stayed within 0.01 of ln K = 3.4657", "lower the teacher temperature"),
    (_peaked, "ERROR", "patch entropy of the mean teacher output is 0.200", "make the views differ more"),
    (_one_winner, "ERROR", "cls has 75% of the samples on one prototype (limit 50%)", "enlarge the batch"),
    (_constant, "WARNING", "cls targets tell samples apart by 0.0", "lower the teacher temperature"),
    (_equal_features, "ERROR", "and mean cosine 1.0000 (limit 0.995)", "go back to an earlier checkpoint"),
    (_flat_features, "WARNING", "patch features have effective rank 4.0 (limit 10)", "raise the weight of KoLeo"),
    (_tight_features, "WARNING", "cls features have a spread of 0.1", "raise the weight of KoLeo"),
    (_broken, "ERROR", "not finite: cls_feature_std", "lower learning rate"),
]


@pytest.mark.parametrize(("observe", "level", "figure", "remedy"), WAYS, ids=[way[0].__name__ for way in WAYS])
def test_collapse_monitor__names_each_collapse_once(
    toy, loader, make_trainer, tmp_path, caplog, observe, level, figure, remedy
) -> None:
    monitor = CollapseMonitor(10, 64, min_information=0.05)
    _run(toy, loader, make_trainer, observe, monitor)
    spoken = [record for record in caplog.records if record.name.startswith("agssd")]
    about = [record for record in spoken if figure in record.getMessage()]
    assert len(about) == 1, [record.getMessage() for record in spoken]
    assert remedy in about[0].getMessage() and about[0].levelname == level
    assert len(spoken) == 1
    assert _rows(tmp_path)[-1]["alarms"] >= 1


@pytest.mark.parametrize(("policy", "observe", "steps"), [
    ("warn", _peaked, 40), ("stop", _peaked, 20), ("stop", _flat_features, 40), ("stop", _healthy, 40),
])  # fmt: skip
def test_collapse_monitor__stops_at_hard_alarms_only_after_grace(
    toy, loader, make_trainer, policy, observe, steps
) -> None:
    monitor = CollapseMonitor(10, 32, policy=policy, grace=0.3)
    trainer = _run(toy, loader, make_trainer, observe, monitor, steps=60 if steps == 20 else 40)
    assert trainer.global_step == steps


def test_collapse_monitor__a_run_made_to_collapse_goes_from_quiet_to_alarm(toy, loader, make_trainer, caplog) -> None:
    def observe(step: int) -> dict[str, Tensor]:
        seen = _healthy(step)
        sharpness = 1 + max(step - 60, 0) / 4
        common = torch.zeros(K).index_fill(0, torch.tensor([5]), max(step - 60, 0) / 8)
        seen["teacher_cls"] = (sharpness * (seen["student_cls"] / 8 + common)).softmax(-1)
        return seen

    _run(toy, loader, make_trainer, observe, CollapseMonitor(10, 32, min_information=0), steps=120)
    spoken = [record.getMessage() for record in caplog.records if record.name.startswith("agssd")]
    assert len(spoken) == 1 and ("one prototype" in spoken[0] or "mean teacher output" in spoken[0])
    assert int(spoken[0].split()[1].rstrip(":")) > 60


def test_collapse_monitor__uniform_needs_its_time_and_remembers_it(toy, loader, make_trainer) -> None:
    monitor = CollapseMonitor(uniform_steps=500)
    figures = {
        "cls_cross_entropy": math.log(K) + 0.005,
        "cls_entropy_batch": 1.0,
        "cls_entropy_sample": 0.5,
        "cls_max_share": 0.1,
        "cls_information": 0.5,
    }

    def names(alarms, step: int) -> list[str]:
        return [alarm.name for alarm in alarms.diagnose(figures, {"cls": K}, step, 100_000)]

    assert names(monitor.alarms, 20_000) == [] and names(monitor.alarms, 20_400) == []
    resumed = CollapseMonitor()
    resumed.load_state_dict(monitor.state_dict())
    assert names(resumed.alarms, 20_500) == ["cls_uniform"]
    figures["cls_cross_entropy"] += 0.1
    assert names(resumed.alarms, 20_600) == []
    figures["cls_cross_entropy"] -= 0.1
    assert names(resumed.alarms, 20_700) == []


def test_collapse_monitor__adds_attention_of_one_sample(toy, loader, make_trainer, tmp_path) -> None:
    module = toy(_healthy, panel={"attention": torch.ones(2, 3, 2, 2, 2)})
    make_trainer(CollapseMonitor(2, 16), max_steps=2).fit(module, loader)
    assert _rows(tmp_path)[0]["attention_entropy"] == pytest.approx(1)


def test_collapse_monitor__is_inert_or_an_error_for_a_module_without_observations(plain, loader, make_trainer) -> None:
    monitor = CollapseMonitor(1)
    make_trainer(monitor, max_steps=2).fit(plain(), loader)
    monitor.explicit = True
    with pytest.raises(ValueError, match="Observable"):
        make_trainer(monitor, max_steps=2).fit(plain(), loader)


@pytest.mark.parametrize("settings", [{"every_n_steps": 0}, {"min_samples": 1}, {"policy": "panic"}])
def test_collapse_monitor__nonsense_is_refused(settings) -> None:
    with pytest.raises(ValueError, match="collapse_monitor"):
        CollapseMonitor(**settings)


RANKS = """
import sys
import lightning.pytorch as pl, torch
from torch.utils.data import DataLoader, TensorDataset
from agssd.callbacks.collapse_monitor import CollapseMonitor
from agssd.callbacks.throughput import Throughput

class Toy(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.observations = None
    def view_panel(self, index):
        return {}
    def training_step(self, batch, index):
        sample = 2 * index + self.global_rank
        generator = torch.Generator().manual_seed(sample)
        logits = torch.randn(8, 16, generator=generator)
        features = torch.randn(8, 12, generator=generator)
        tokens = features[: 8 - 5 * self.global_rank]  # ranks differ in their number of tokens
        self.observations = {"teacher_cls": (3 * logits).softmax(-1), "student_cls": logits,
                             "cls_features": features, "patch_features": tokens,
                             "scalars": {"rank": torch.tensor(float(self.global_rank))}}
        return self.layer(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

torch.set_num_threads(1)
loader = DataLoader(TensorDataset(torch.randn(64, 4)), batch_size=2)
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_steps=8, max_epochs=-1, default_root_dir=sys.argv[1],
    logger=pl.loggers.CSVLogger(sys.argv[1], name="", version=""), callbacks=[CollapseMonitor(4, 64), Throughput(2)],
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
trainer.fit(Toy(), loader)
"""


@pytest.mark.slow
def test_collapse_monitor__two_ranks_equal_their_joined_samples(tmp_path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    row = _rows(tmp_path)[-1]
    sums, features, tokens = 0, [], []
    for sample in range(16):
        generator = torch.Generator().manual_seed(sample)
        logits = torch.randn(8, 16, generator=generator)
        rows = torch.randn(8, 12, generator=generator)
        if sample < 8:  # four steps of both ranks fill the share of each, 32 rows
            features.append(rows)
            sums = sums + distribution_sums((3 * logits).softmax(-1), logits)
        if sample % 2 or sample < 8:  # rank 1 has 24 tokens after eight steps, and the report waits no longer
            tokens.append(rows[: 8 - 5 * (sample % 2)])
    for name, value in distribution_figures(sums).items():
        assert row[f"cls_{name}"] == pytest.approx(float(value), rel=1e-5)
    assert row["cls_effective_rank"] == pytest.approx(float(effective_rank(torch.cat(features))), rel=1e-4)
    assert row["patch_effective_rank"] == pytest.approx(float(effective_rank(torch.cat(tokens))), rel=1e-4)
    assert row["rank"] == 0.5
