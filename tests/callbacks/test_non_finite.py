"""A step that is not finite is withheld on all ranks, told, captured, counted, and can be replayed from its capture."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import recipes
import torch
from torch import Tensor

from agssd.callbacks.collapse_alarms import Alarm
from agssd.callbacks.collapse_monitor import CollapseMonitor
from agssd.callbacks.non_finite import CAPTURES, NonFinite
from agssd.callbacks.run_checkpoint import RunCheckpoint
from agssd.commands import replay
from agssd.methods.agssd import AGSSD
from agssd.methods.base import PretrainModule
from agssd.methods.dino import DINO
from agssd.methods.s2dc import S2DC


class Config(L.Callback):
    """Knows the configuration, as the CLI's callback does."""

    def __init__(self, model: dict[str, Any]) -> None:
        self.model = model

    def plain_config(self) -> dict[str, Any]:
        return {"model": self.model}


VIT = {
    "class_path": "agssd.models.vit.ViT",
    "init_args": {"in_channels": 1, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3, "drop_path": 0.3},
}
VIEWS = {
    "class_path": "agssd.transforms.crops.OverlapCrops",
    "init_args": {"size_vox": [24, 24, 24], "scale": [0.6, 1.0], "num_local": 2, "local_size_vox": [16, 16, 16]},
}


def config_of(kind: type[PretrainModule]) -> Config:
    """Return what ``recipes.build`` builds, as a configuration."""
    import inspect

    own = {name: value for name, value in recipes.SMALL.items() if name in inspect.signature(kind).parameters}
    return Config(
        {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": own | {"backbone": VIT, "views": VIEWS}}
    )


def spoiling(kind: type[PretrainModule], steps: tuple[int, ...], what: str = "input") -> type[Any]:
    """Return the recipe with something that is not finite in these steps."""

    class Spoilt(kind):  # type: ignore[misc, valid-type]
        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            if what == "input" and self.trainer.training and self.trainer.global_step in steps:
                batch["scale"][1] = float("nan")
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

        def pretrain_loss(self, views: Any) -> Any:
            loss = super().pretrain_loss(views)
            now = round(self.progress * 8)
            if what == "gradient" and now in steps:
                weight = self.student["backbone"].blocks[1].fc1.weight  # finite, but its gradient is 0 / 0
                loss = loss._replace(total=loss.total + (0 * weight).square().sum().sqrt())
            if what == "koleo" and now in steps:
                terms = loss.terms | {"koleo": loss.total * float("inf")}
                loss = loss._replace(total=loss.total + terms["koleo"], terms=terms)
            return loss

    return Spoilt


def fit(kind: type[Any], cache: Path, out: Path, *callbacks: L.Callback, steps: int = 8, **given: Any) -> L.Trainer:
    trainer = recipes.trainer(*callbacks, max_steps=steps, default_root_dir=out, **given)
    trainer.fit(recipes.build(kind), recipes.data_module(cache))
    return trainer


def actions(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "actions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", [DINO, AGSSD, S2DC], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_non_finite__steps_move_nothing_and_the_run_goes_on(
    kind: type[Any], accumulate: int, tiny_cache: Path, tmp_path: Path
) -> None:
    states, record, guard = recipes.States(), recipes.Recorder(), NonFinite()
    trainer = fit(
        spoiling(kind, (3, 4)), tiny_cache, tmp_path, guard, states, record, accumulate_grad_batches=accumulate
    )
    found = states.found[accumulate - 1 :: accumulate]
    assert len(found) == 8 and trainer.global_step == 8
    for name, value in found[2].items():
        assert torch.equal(found[3][name], value) and torch.equal(found[4][name], value), name
    for name, value in found[7].items():
        assert value.isfinite().all(), name
    assert not torch.equal(found[5]["moments"], found[4]["moments"])
    assert len({rates[0] for rates in record.rates}) >= 7, "the schedule goes on"
    assert (guard.total, guard.in_a_row) == (2, 0)
    assert [one["skipped_step"] for one in actions(tmp_path) if one["action"] == "skip"] == [3, 4]
    assert len(list((tmp_path / CAPTURES).glob("*.pt"))) == 2


@pytest.mark.parametrize(
    ("what", "told", "place"),
    [
        ("input", "loss", r"first not finite in input: scale \(1 NaN .* of sample \d+\)"),
        ("gradient", "gradient", r"first not finite in backward: student.backbone.blocks.1.fc1.weight"),
        ("koleo", "loss loss_koleo", r"first not finite in loss: koleo"),
    ],
)
def test_non_finite__the_first_place_is_named(
    what: str, told: str, place: str, tiny_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(spoiling(DINO, (3,), what), tiny_cache, tmp_path, NonFinite())
    said = [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith(f"step 3: {told}")
    assert re.search(place, said[0]), said[0]


def test_non_finite__stops_with_a_report_after_so_many_in_a_row_or_in_all(tiny_cache: Path, tmp_path: Path) -> None:
    row = NonFinite(max_skipped=2, max_captures=1)
    assert fit(spoiling(DINO, (1, 3, 4, 5, 6)), tiny_cache, tmp_path / "row", row).global_step == 5
    stop = actions(tmp_path / "row")[-1]
    assert stop["action"] == "stop" and "replay captures/step" in stop["reason"] and str(tmp_path) in row.stopped
    assert str(tmp_path) not in (tmp_path / "row/actions.jsonl").read_text()
    assert "2 in a row (limit non_finite.max_skipped 2)" in row.stopped and "at step 4" in row.stopped
    assert "scale" in actions(tmp_path / "row")[0]["finding"]["where"]
    assert len(list((tmp_path / "row" / CAPTURES).iterdir())) == 1
    total = NonFinite(max_skipped=0, max_skipped_total=3)
    assert fit(spoiling(DINO, (1, 3, 5, 7)), tiny_cache, tmp_path / "all", total).global_step == 6
    assert "3 in all" in total.stopped and "agssd replay" in total.stopped


def fill(folder: Path) -> None:
    with (folder / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("small_disk", ["256k"], indirect=True)
@pytest.mark.parametrize("full", [True, False], ids=["full", "too-small"])
def test_non_finite__a_full_disk_costs_the_capture_alone(
    full: bool, small_disk: Path, tiny_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if full:
        fill(small_disk)
    guard = NonFinite()
    assert fit(spoiling(DINO, (3,)), tiny_cache, small_disk, guard).global_step == 8
    assert guard.total == 1 and not list(small_disk.glob(f"{CAPTURES}/*"))
    assert "step00000003-rank0.pt cannot be written" in caplog.text
    if full:
        assert "actions.jsonl lacks a line (No space left on device)" in caplog.text
        assert (small_disk / "actions.jsonl").stat().st_size == 0
    else:
        assert [one["skipped_step"] for one in actions(small_disk)] == [3]


def test_non_finite__a_look_that_fails_costs_the_finding_alone(
    tiny_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Hungry(spoiling(DINO, (3,))):  # type: ignore[misc]
        def pretrain_loss(self, views: Any) -> Any:
            loss = super().pretrain_loss(views)
            if self.fixed_progress is not None:  # as within the look
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return loss

        def transfer_batch_to_device(self, batch: Any, *given: Any) -> Any:
            moved = super().transfer_batch_to_device(batch, *given)
            if self.parents is not None and self.parents:
                self.parents[-1] = {name: value.nan_to_num() for name, value in batch.items()}
            return moved

    states: list[recipes.States] = [recipes.States(), recipes.States()]
    for folder, record, captures in (("look", states[0], 3), ("none", states[1], 0)):
        trainer = fit(Hungry, tiny_cache, tmp_path / folder, NonFinite(max_captures=captures), record)
        assert trainer.global_step == 8
    said = [one.getMessage() for one in caplog.records if "looking for the first place failed" in one.getMessage()]
    assert len(said) == 1 and "OutOfMemoryError: CUDA out of memory" in said[0]
    captured = replay.read_capture(tmp_path / "look" / CAPTURES / "step00000003-rank0.pt")
    assert captured["finding"] is None and captured["step"] == 3
    assert actions(tmp_path / "look")[0]["capture"] == "step00000003-rank0.pt"
    assert all(torch.equal(states[1].found[-1][name], value) for name, value in states[0].found[-1].items())


def test_non_finite__looking_changes_nothing_of_the_run(tiny_cache: Path, tmp_path: Path) -> None:
    """With and without captures the run goes on bit for bit alike, random states, centres and sums included."""
    ends = []
    for captures in (0, 3):
        states = recipes.States()
        fit(spoiling(AGSSD, (3,)), tiny_cache, tmp_path / str(captures), NonFinite(max_captures=captures), states)
        ends.append(states.found[-1])
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())


# --------------------------------------------------- beside the collapse monitor


NEVER = {"min_entropy_batch": 0.0, "max_share": 2.0, "min_information": -1.0, "min_feature_std": 0.0}
NEVER |= {"soft_rank": 0.0, "hard_rank": 0.0, "max_cosine": 2.0, "min_distance": 0.0, "uniform_margin": 0.0}


class Reports(CollapseMonitor):
    """Keeps the figures that it judges; no alarm of theirs is on but ``non_finite``."""

    def __init__(self, every: int, samples: int, policy: Any) -> None:
        super().__init__(every, samples, policy, grace=0.0, max_gradient_ratio=1e9, max_fused_gain=2.0, **NEVER)
        self.seen: dict[int, dict[str, float]] = {}
        diagnose = self.alarms.diagnose

        def look(figures: dict[str, float], prototypes: Any, step: int, total: int) -> Any:
            self.seen[step] = figures
            return diagnose(figures, prototypes, step, total)

        self.alarms.diagnose = look  # type: ignore[method-assign]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("bad", "reported"), [(3, [8, 12, 16]), (2, [8, 12, 16]), (0, [4, 8, 12, 16])])
def test_non_finite__a_withheld_step_is_no_collapse(
    bad: int, reported: list[int], accumulate: int, tiny_cache: Path, tmp_path: Path
) -> None:
    samples = 4 * 4  # a report looks at two steps: two views of four samples each
    monitor, guard = Reports(4, samples, "stop"), NonFinite()
    given: dict[str, Any] = {"accumulate_grad_batches": accumulate, "steps": 16}
    trainer = fit(spoiling(DINO, (bad,)), tiny_cache, tmp_path, guard, monitor, **given)
    assert guard.total == 1 and trainer.global_step == 16 and not monitor.stopped
    assert [one["action"] for one in actions(tmp_path)] == ["skip"]
    assert sorted(monitor.seen) == reported
    for step, figures in monitor.seen.items():
        assert all(math.isfinite(value) for value in figures.values()), (step, figures)


def test_non_finite__weights_that_are_broken_for_good_are_a_collapse(tiny_cache: Path, tmp_path: Path) -> None:
    monitor, guard = Reports(4, 8, "stop"), NonFinite(max_skipped=0)
    trainer = fit(spoiling(DINO, tuple(range(6, 16))), tiny_cache, tmp_path, guard, monitor, steps=16)
    assert trainer.global_step == 12 and "not finite" in monitor.stopped, "the steps to 8 are 2, those to 12 are 6"


class Late(NonFinite):
    """Reads the judgement of a step with the next one, as on CUDA."""

    late = False

    def on_train_batch_end(self, *given: Any) -> None:
        self.late = True
        super().on_train_batch_end(*given)
        self.late = False

    def settle(self, *given: Any) -> None:
        if not self.late:
            super().settle(*given)


def test_non_finite__a_step_read_late_is_captured_before_a_rollback(tiny_cache: Path, tmp_path: Path) -> None:
    class Broken(Reports):
        def _report(self, trainer: Any, module: Any) -> None:
            if self.rollback.done or trainer.global_step < 10:
                self.rollback.judge_newest(trainer, self.state_key, healthy=True)
            else:
                self.rollback.demand(trainer, module, [Alarm("non_finite", True, "broken")])

        @property
        def state_key(self) -> str:
            return "Broken"

    states, monitor = recipes.States(), Broken(2, 8, "rollback")
    keep = RunCheckpoint(every_n_train_steps=4, dirpath=str(tmp_path / "checkpoints"), in_background=False)
    fit(spoiling(DINO, (8, 9)), tiny_cache, tmp_path, Late(), states, monitor, keep, steps=12,
        enable_checkpointing=True)  # fmt: skip
    assert [one["to_step"] for one in monitor.rollback.done][0] < 8
    assert [path.name for path in sorted((tmp_path / CAPTURES).iterdir())] == [
        "step00000008-rank0-2.pt", "step00000008-rank0.pt", "step00000009-rank0.pt"
    ]  # fmt: skip
    captured = replay.read_capture(tmp_path / CAPTURES / "step00000009-rank0.pt")
    for name, value in captured["state_dict"].items():
        assert torch.equal(value, states.found[9][name]), name


def test_non_finite__a_step_read_late_is_counted_in_the_checkpoint_after_it(tiny_cache: Path, tmp_path: Path) -> None:
    keep = RunCheckpoint(every_n_train_steps=4, dirpath=str(tmp_path / "checkpoints"))
    fit(spoiling(DINO, (3,)), tiny_cache, tmp_path, Late(), keep, steps=6, enable_checkpointing=True)
    saved = torch.load(tmp_path / "checkpoints/step00000004.ckpt", weights_only=True)["callbacks"]
    (counted,) = (state for state in saved.values() if "in_a_row" in state)
    assert counted == {"in_a_row": 1, "total": 1}


# ------------------------------------------------------------------ replay


@pytest.fixture
def capture(tiny_cache: Path, tmp_path: Path) -> Path:
    """Return the capture of a spoilt step of AG-SSD."""
    kind = spoiling(AGSSD, (3,))
    fit(kind, tiny_cache, tmp_path, NonFinite(), config_of(AGSSD), precision="bf16-mixed")
    return next((tmp_path / CAPTURES).glob("*.pt"))


def test_replay__works_from_the_capture_alone(capture: Path, tmp_path: Path, capsys: Any) -> None:
    moved = tmp_path / "elsewhere.pt"
    capture.rename(moved)
    parser = __import__("argparse").ArgumentParser()
    replay.add_arguments(parser)
    assert replay.run(parser.parse_args([str(moved)])) == 0
    said = capsys.readouterr().out
    assert "step        3 of 8, rank 0 of 1" in said
    assert re.search(r"bf16-mixed *first not finite in input: scale", said)
    assert re.search(r"float32 *first not finite in input: scale", said)


def test_replay__repeats_the_loss_of_the_step_bit_for_bit(tiny_cache: Path, tmp_path: Path) -> None:
    """A capture of a healthy step, taken by force, gives the very loss that the run had."""
    seen: list[Tensor] = []

    class Whole(AGSSD):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            seen.append(loss.detach())
            self.guard.local = self.guard.local * float("nan") if self.trainer.global_step == 5 else self.guard.local
            return loss

    fit(Whole, tiny_cache, tmp_path, NonFinite(), config_of(AGSSD))
    captured = replay.read_capture(next((tmp_path / CAPTURES).glob("*.pt")))
    assert captured["step"] == 5 and captured["finding"] is None
    module = replay.rebuild(captured, "cpu")
    module.mask_ratio = tuple(captured["mask_ratio"])
    with torch.no_grad():
        views = module.make_views(captured["batches"][0])
    assert torch.equal(module.pretrain_loss(views).total.detach(), seen[5])


def test_replay__refuses_what_is_no_capture(tmp_path: Path, capsys: Any) -> None:
    torch.save({"state_dict": {}}, tmp_path / "x.pt")
    for path, reason in ((tmp_path / "x.pt", "is no capture"), (tmp_path / "none.pt", "no such capture")):
        with pytest.raises(ValueError, match=reason):
            replay.read_capture(path)


def test_capture__holds_no_path_and_no_name_and_is_data_only(capture: Path, tiny_cache: Path) -> None:
    content = torch.load(capture, weights_only=True)
    told = json.dumps({k: v for k, v in content.items() if k not in ("state_dict", "batches", "random_state")})
    assert str(tiny_cache.parent) not in told and "subject" not in told and "case0" not in told
    assert set(content["batches"][0]) >= {"image", "sample", "case"}


# ----------------------------------------------------------------- two ranks


@pytest.mark.slow
@pytest.mark.ddp
def test_non_finite__two_ranks_withhold_alike_and_the_guilty_one_captures(tiny_cache: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("one_goes_wrong.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(script), "poison", str(tiny_cache), str(tmp_path)],
        capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"states{rank}.pt", weights_only=True) for rank in range(2)]
    for first, second in zip(*ranks, strict=True):
        assert all(torch.equal(second[name], value) for name, value in first.items())
    before, after, later = ranks[0][3:6]
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not torch.equal(later["moments"], after["moments"])
    assert [path.name for path in (tmp_path / CAPTURES).iterdir()] == ["step00000004-rank1.pt"]
    (told,) = actions(tmp_path)
    assert told["capture"] == "step00000004-rank1.pt" and told["finding"]["where"] == "scale"
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert [rank["NonFinite"]["captured"] for rank in saved["ranks"]] == [0, 1]
