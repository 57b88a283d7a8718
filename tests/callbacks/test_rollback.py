"""A hard alarm brings the run back to its last healthy checkpoint, bit for bit, and on with a lower temperature."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import recipes
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from agssd.callbacks.collapse_alarms import Alarm
from agssd.callbacks.collapse_monitor import CollapseMonitor
from agssd.callbacks.run_checkpoint import RunCheckpoint
from agssd.methods.agssd import AGSSD
from agssd.methods.dino import DINO
from agssd.methods.simmim import SimMIM
from agssd.run.checkpoints import HEALTHY, newest_checkpoint

STEPS, EVERY = 24, 4


class Scripted(CollapseMonitor):
    """Reports every second step and sees the alarms that it is told for each."""

    def __init__(self, script: dict[int, Alarm], **settings: Any) -> None:
        super().__init__(every_n_steps=2, min_samples=2, **{"policy": "rollback"} | settings)
        self.reported: list[int] = []
        left = dict(script)

        def diagnose(figures: Any, prototypes: Any, step: int, total: int) -> list[Alarm]:
            self.reported.append(step)
            return [left.pop(step)] if step in left else []

        self.alarms.diagnose = diagnose  # type: ignore[method-assign]

    @property
    def state_key(self) -> str:
        return "CollapseMonitor"


UNIFORM = Alarm("cls_uniform", True, "the outputs are uniform", "temperature")
PEAKED = Alarm("cls_peaked", True, "few prototypes", "lr")


def fit(
    kind: type[Any],
    monitor: L.Callback,
    cache: Path,
    out: Path,
    resume: Path | None = None,
    every: int = EVERY,
    more: Sequence[L.Callback] = (),
    **given: Any,
) -> Any:
    """Return module, data module, record and states after each step of a run with checkpoints."""
    module, data, record, states = recipes.build(kind), recipes.data_module(cache), recipes.Recorder(), recipes.States()
    keep = RunCheckpoint(every_n_train_steps=every, dirpath=str(out / "checkpoints"))
    settings: dict[str, Any] = {"max_steps": STEPS, "enable_checkpointing": True, "default_root_dir": out}
    trainer = recipes.trainer(monitor, record, states, *more, keep, **settings | given)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return module, data, record, states.found, trainer


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("kind", [DINO, pytest.param(AGSSD, marks=pytest.mark.slow)], ids=["DINO", "AGSSD"])
def test_rollback__equals_a_run_resumed_by_hand_with_the_lower_temperature(
    kind: type[Any], accumulate: int, tiny_cache: Path, tmp_path: Path
) -> None:
    monitor = Scripted({14: UNIFORM})  # of the checkpoints at 4, 8 and 12, a report without alarm follows 8 last
    module, data, record, states, trainer = fit(kind, monitor, tiny_cache, tmp_path, accumulate_grad_batches=accumulate)
    assert monitor.rollback.done == [
        {"from_step": 14, "to_step": 8, "alarms": ["cls_uniform"], "lowered": "temperature"}
    ]
    assert trainer.global_step == STEPS and data.undone_steps == 6
    assert len(record.losses) == STEPS + 6

    class ByHand(kind):  # type: ignore[misc, valid-type]
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            super().on_load_checkpoint(checkpoint)
            self.eased["temperature"] = 0.7

    healthy = _checkpoint_at(kind, 8, accumulate, tiny_cache, tmp_path / "hand")
    key = next(name for name in healthy if name.endswith("DataModule"))
    healthy[key]["undone_steps"] = 6
    torch.save(healthy, tmp_path / "by_hand.ckpt")
    again, other, resumed = recipes.build(ByHand), recipes.data_module(tiny_cache), recipes.States()
    for tensor in again.state_dict().values():
        tensor.zero_()
    recipes.trainer(recipes.Recorder(), resumed, max_steps=STEPS, accumulate_grad_batches=accumulate).fit(
        again, other, ckpt_path=tmp_path / "by_hand.ckpt", weights_only=True
    )
    for name, value in states[-1].items():
        assert torch.equal(resumed.found[-1][name], value), name
    assert module.eased == again.eased == {"lr": 1.0, "temperature": 0.7}


def _checkpoint_at(kind: type[Any], step: int, accumulate: int, cache: Path, out: Path) -> dict[str, Any]:
    """Return the checkpoint of an undisturbed run after ``step`` steps."""
    module, data = recipes.build(kind), recipes.data_module(cache)

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == step and not (out / "at.ckpt").exists():
                trainer.save_checkpoint(out / "at.ckpt")

    recipes.trainer(recipes.Recorder(), Save(), max_steps=STEPS, accumulate_grad_batches=accumulate).fit(module, data)
    found: dict[str, Any] = torch.load(out / "at.ckpt", weights_only=True)
    return found


def test_rollback__is_told_and_the_next_one_lowers_the_other(
    tiny_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = {10: UNIFORM, 16: UNIFORM, 20: PEAKED}
    monitor = Scripted(script, temperature_factor=0.5, lr_factor=0.25)
    module, data, record, *_ = fit(DINO, monitor, tiny_cache, tmp_path)
    assert [one["lowered"] for one in monitor.rollback.done] == ["temperature", "lr", "lr"]
    assert module.eased == {"lr": 0.0625, "temperature": 0.5}
    assert record.rates[-1][0] == pytest.approx(module.min_lr / 16)
    lines = [json.loads(line) for line in (tmp_path / "actions.jsonl").read_text().splitlines()]
    assert [line["action"] for line in lines] == ["alarm", "rollback"] * 3
    assert lines[1]["alarms"] == ["cls_uniform"] and lines[1]["factors"] == {"lr": 1.0, "temperature": 0.5}
    said = [message for message in caplog.messages if "rolled back to the healthy checkpoint of step" in message]
    assert len(said) == 3 and "temperature is now 0.5 of what is scheduled (rollback 1 of 3)" in said[0]


def test_rollback__samples_after_it_are_new_ones(tiny_cache: Path, tmp_path: Path) -> None:
    *_, record, _, _ = fit(DINO, Scripted({10: UNIFORM}), tiny_cache, tmp_path)
    drawn = [number for batch in record.samples for number in batch]
    assert drawn == list(range(len(drawn)))


def test_rollback__resumed_after_it_equals_undisturbed(tiny_cache: Path, tmp_path: Path) -> None:
    whole = fit(DINO, Scripted({10: UNIFORM}), tiny_cache, tmp_path / "whole")

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = monitor.rollback.done != [] and trainer.global_step == 16

    monitor = Scripted({10: UNIFORM})
    module, data = recipes.build(DINO), recipes.data_module(tiny_cache)
    out = tmp_path / "part" / "checkpoints"
    keep = RunCheckpoint(every_n_train_steps=EVERY, dirpath=str(out))
    recipes.trainer(
        recipes.Recorder(),
        monitor,
        Stop(),
        keep,
        max_steps=STEPS,
        enable_checkpointing=True,
        default_root_dir=out.parent,
    ).fit(module, data)
    saved = torch.load(out / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 16 and saved["agssd"]["eased"]["temperature"] == 0.7
    again = Scripted({})
    resumed = fit(DINO, again, tiny_cache, tmp_path / "part", resume=out / "last.ckpt")
    assert len(again.rollback.done) == 1
    assert resumed[1].undone_steps == whole[1].undone_steps > 0
    for name, value in whole[3][-1].items():
        assert torch.equal(resumed[3][-1][name], value), name


class Crash(BaseException):
    """Nothing after it reaches the disk."""


def stop_disk(monkeypatch: pytest.MonkeyPatch, event: int) -> list[str]:
    """From the ``event``-th change of the disk within a rollback on let every one fail; return what was done before."""
    done: list[str] = []
    rolled_back, seen = RunCheckpoint.rolled_back, [False]

    def during(*given: Any) -> None:
        seen[0] = True
        rolled_back(*given)

    def watch(place: Any, name: str) -> None:
        call = getattr(place, name)

        def stand_in(*given: Any, **named: Any) -> Any:
            if seen[0]:
                if len(done) >= event:
                    raise Crash(name)
                done.append(name)
            return call(*given, **named)

        monkeypatch.setattr(place, name, stand_in)

    monkeypatch.setattr(RunCheckpoint, "rolled_back", during)
    for name in ("replace", "link", "unlink", "remove", "fsync"):
        watch(os, name)
    watch(torch, "save")
    return done


# before each of: save, fsync, replace, fsync, link, replace, fsync, and two renames aside
@pytest.mark.parametrize("event", [3, 7, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1, 2, 4, 5, 6, 8))])
def test_rollback__killed_at_any_moment_of_it_and_resumed_equals_undisturbed(
    event: int, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft = Alarm("cls_low_rank", False, "soft", "lr")
    script = {6: soft, 8: soft, 10: UNIFORM}  # back to step 2, which is no longer kept then
    settings: dict[str, Any] = {"every": 2, "max_steps": 12}
    whole = fit(DINO, Scripted(script), tiny_cache, tmp_path / "whole", **settings)
    folder = tmp_path / "cut" / "checkpoints"
    with monkeypatch.context() as patch:
        done = stop_disk(patch, event)
        with pytest.raises(Crash):
            fit(DINO, Scripted(script), tiny_cache, tmp_path / "cut", **settings)
    assert len(done) == event
    found = newest_checkpoint(str(folder))
    assert found is not None
    state = found[1]["callbacks"]["CollapseMonitor"]
    assert found[1]["global_step"] == 8 and state["rollbacks"] == []  # the alarm is raised and answered once more
    again = Scripted({step: alarm for step, alarm in script.items() if step > 8})
    resumed = fit(DINO, again, tiny_cache, tmp_path / "cut", resume=Path(found[0]), **settings)
    assert [one["to_step"] for one in again.rollback.done] == [2]
    assert resumed[1].undone_steps == whole[1].undone_steps == 8
    for name, value in whole[4].lightning_module.state_dict().items():
        assert torch.equal(resumed[4].lightning_module.state_dict()[name], value), name
    names = [sorted(path.name for path in (tmp_path / run / "checkpoints").iterdir()) for run in ("whole", "cut")]
    assert names[0] == names[1]


def test_rollback__its_checkpoint_holds_what_stands_after_it_and_is_kept(tiny_cache: Path, tmp_path: Path) -> None:
    soft = Alarm("cls_low_rank", False, "soft", "lr")

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if monitor.rollback.done and not held:
                for name in ("step00000002.ckpt", "last.ckpt"):
                    held.append(torch.load(tmp_path / "checkpoints" / name, weights_only=True))

    monitor, held = Scripted({6: soft, 8: soft, 10: UNIFORM}), list[Any]()
    fit(DINO, monitor, tiny_cache, tmp_path, every=2, max_steps=11, more=[Look()])
    for saved in held:
        assert saved["global_step"] == 2 and saved["agssd"]["eased"]["temperature"] == 0.7
        state = saved["callbacks"]["CollapseMonitor"]
        assert state["standing"] == [] and state["uniform_since"] == {} and state["pending"] == {}
        assert len(state["rollbacks"]) == 1
    assert len(held) == 2


def test_rollback__stops_with_a_report_when_it_cannot_go_on(tiny_cache: Path, tmp_path: Path) -> None:
    early = Scripted({2: UNIFORM})
    assert fit(DINO, early, tiny_cache, tmp_path / "early")[-1].global_step == 2
    assert "no healthy checkpoint" in early.stopped
    often = Scripted({10: UNIFORM, 16: UNIFORM}, max_rollbacks=1)
    assert fit(DINO, often, tiny_cache, tmp_path / "often")[-1].global_step == 16
    assert "max_rollbacks is 1" in often.stopped and "the outputs are uniform" in often.stopped
    other = Scripted({10: PEAKED}, policies={"peaked": "stop"})
    assert fit(DINO, other, tiny_cache, tmp_path / "stop")[-1].global_step == 10 and other.stopped
    alone = Scripted({10: PEAKED}, policies={"cls_peaked": "warn"})
    assert fit(DINO, alone, tiny_cache, tmp_path / "warn")[-1].global_step == STEPS and not alone.rollback.done


def test_rollback__one_that_is_due_after_the_last_step_ends_with_a_report(tiny_cache: Path, tmp_path: Path) -> None:
    monitor = Scripted({STEPS: UNIFORM})
    *_, trainer = fit(DINO, monitor, tiny_cache, tmp_path)
    assert trainer.global_step == STEPS and not monitor.rollback.done and not monitor.rollback.pending
    assert monitor.stopped.startswith("the outputs are uniform; that was the last step")
    last = json.loads((tmp_path / "actions.jsonl").read_text().splitlines()[-1])
    assert last["action"] == "stop" and last["reason"] == monitor.stopped
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["CollapseMonitor"]
    assert saved["pending"] == {}


def test_rollback__one_that_is_due_where_a_run_is_cut_is_made_when_it_goes_on(tiny_cache: Path, tmp_path: Path) -> None:
    class Cut(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop |= trainer.global_step == 10

    cut, again = Scripted({10: UNIFORM}), Scripted({})
    fit(DINO, cut, tiny_cache, tmp_path, more=[Cut()])
    assert cut.rollback.pending and not cut.stopped
    fit(DINO, again, tiny_cache, tmp_path, resume=tmp_path / "checkpoints/last.ckpt")
    assert [(one["from_step"], one["to_step"]) for one in again.rollback.done] == [(10, 4)] and not again.stopped


def run_to(end: int, monitor: Scripted, cache: Path, out: Path, resume: Path | None = None) -> L.Trainer:
    """Return the trainer of a run that keeps every checkpoint and is cut at ``end``."""

    class Cut(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop |= trainer.global_step == end

    keep = RunCheckpoint(every_n_train_steps=EVERY, dirpath=str(out / "checkpoints"), keep_last=-1)
    trainer = recipes.trainer(
        monitor, Cut(), keep, max_steps=STEPS, enable_checkpointing=True, default_root_dir=out
    )  # fmt: skip
    trainer.fit(recipes.build(DINO), recipes.data_module(cache), ckpt_path=resume, weights_only=True)
    return trainer


def test_rollback__the_healthy_checkpoint_of_a_part_left_behind_is_not_gone_back_to(
    tiny_cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    run_to(STEPS, Scripted({}), tiny_cache, tmp_path)
    assert torch.load(folder / HEALTHY, weights_only=True)["global_step"] == 20
    monitor = Scripted({6: UNIFORM})
    assert run_to(10, monitor, tiny_cache, tmp_path, folder / "step00000004.ckpt").global_step == 6
    assert not monitor.rollback.done and "there is no healthy checkpoint" in monitor.stopped
    assert (folder / f"{HEALTHY}.aside").is_file() and not (folder / HEALTHY).exists()
    # one that lies there all the same is refused, and no run goes on from it by itself
    (folder / f"{HEALTHY}.aside").rename(folder / HEALTHY)
    found = newest_checkpoint(str(folder))
    assert found is not None and found[1]["global_step"] == 6

    class Late(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            healthy.write_bytes(content)

    healthy, content = tmp_path / "late/checkpoints" / HEALTHY, (folder / HEALTHY).read_bytes()
    healthy.parent.mkdir(parents=True)
    monitor = Scripted({2: UNIFORM})
    assert fit(DINO, monitor, tiny_cache, tmp_path / "late", more=[Late()])[-1].global_step == 2
    assert "healthy.ckpt is of step 20" in monitor.stopped


def test_rollback__a_torn_healthy_checkpoint_stops_with_a_report(tiny_cache: Path, tmp_path: Path) -> None:
    class Tear(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 13:
                content = bytearray((tmp_path / "checkpoints" / HEALTHY).read_bytes())
                content[len(content) // 2] ^= 1
                (tmp_path / "checkpoints" / HEALTHY).write_bytes(content)

    monitor = Scripted({14: UNIFORM})
    assert fit(DINO, monitor, tiny_cache, tmp_path, more=[Tear()])[-1].global_step == 14
    assert not monitor.rollback.done and "healthy.ckpt is damaged" in monitor.stopped


def test_rollback__a_torn_newest_checkpoint_is_not_healthy(tiny_cache: Path, tmp_path: Path) -> None:
    class Tear(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 9:
                trainer.strategy.checkpoint_io.wait()
                os.truncate(tmp_path / "checkpoints/step00000008.ckpt", 1000)

    monitor = Scripted({12: UNIFORM})
    fit(DINO, monitor, tiny_cache, tmp_path, more=[Tear()])
    assert [one["to_step"] for one in monitor.rollback.done] == [4]


def test_rollback__a_checkpoint_under_alarm_is_not_healthy(tiny_cache: Path, tmp_path: Path) -> None:
    soft = Alarm("cls_low_rank", False, "soft", "lr")
    # soft alarms stand at 8 and 10, when step 8 is saved; the healthy one stays that of step 4
    monitor = Scripted({8: soft, 10: soft, 14: UNIFORM})
    fit(DINO, monitor, tiny_cache, tmp_path, max_steps=16)
    assert monitor.rollback.done[0]["to_step"] == 4
    early = Scripted({8: soft, 10: soft, 12: UNIFORM})
    fit(DINO, early, tiny_cache, tmp_path / "early", max_steps=14)
    assert early.rollback.done[0]["to_step"] == 4


class Seen(CollapseMonitor):
    """Sees alarms once most of a report's samples are of broken weights."""

    def __init__(self, broken_from: int, every_n_steps: int, window_steps: int) -> None:
        super().__init__(every_n_steps, window_steps * 2 * recipes.GLOBAL_BATCH, policy="rollback")

        def diagnose(figures: Any, prototypes: Any, step: int, total: int) -> list[Alarm]:
            broken = step - max(broken_from, step - window_steps)
            return [UNIFORM] if broken > window_steps / 2 and not self.rollback.done else []

        self.alarms.diagnose = diagnose  # type: ignore[method-assign]

    @property
    def state_key(self) -> str:
        return "CollapseMonitor"


def test_rollback__a_checkpoint_saved_within_the_window_of_a_report_is_not_healthy_by_it(
    tiny_cache: Path, tmp_path: Path
) -> None:
    """Weights break at step 7 and are saved at 7; the report at 8 is of steps 5 to 8 and sees mostly sound ones."""
    monitor = Seen(broken_from=7, every_n_steps=8, window_steps=4)
    fit(DINO, monitor, tiny_cache, tmp_path, every=1, max_steps=18)
    assert [(one["from_step"], one["to_step"]) for one in monitor.rollback.done] == [(16, 4)]


@pytest.mark.parametrize("cut_at", [6, *(pytest.param(step, marks=pytest.mark.slow) for step in (5, 7, 10))])
def test_rollback__goes_where_an_undisturbed_run_goes_however_it_was_cut(
    cut_at: int, tiny_cache: Path, tmp_path: Path
) -> None:
    """Saves and reports every 4 steps, windows of 3 steps: a cut comes within a window, or between save and window."""

    class Cut(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == cut_at:
                next(one for one in trainer.callbacks if isinstance(one, RunCheckpoint)).save_before_next(trainer)
                trainer.should_stop = True

    def went(out: Path, *more: L.Callback, resume: Path | None = None) -> Seen:
        monitor = Seen(broken_from=9, every_n_steps=4, window_steps=3)
        fit(DINO, monitor, tiny_cache, out, max_steps=16, more=more, resume=resume)
        return monitor

    whole = went(tmp_path / "whole").rollback.done
    assert [(one["from_step"], one["to_step"]) for one in whole] == [(12, 4)]
    assert not went(tmp_path / "cut", Cut()).rollback.done
    again = went(tmp_path / "cut", resume=tmp_path / f"cut/checkpoints/step{cut_at:08d}.ckpt")
    assert again.rollback.done == whole
    names = [sorted(path.name for path in (tmp_path / run / "checkpoints").iterdir()) for run in ("whole", "cut")]
    assert HEALTHY in names[1] and not any("candidate" in name for name in names[0] + names[1])


def test_rollback__where_the_best_checkpoint_has_a_folder_of_its_own(tiny_cache: Path, tmp_path: Path) -> None:
    monitor, best = Scripted({14: UNIFORM}), ModelCheckpoint(dirpath=str(tmp_path / "best"), save_top_k=0)
    fit(DINO, monitor, tiny_cache, tmp_path, max_steps=16, more=[best])
    assert [one["to_step"] for one in monitor.rollback.done] == [8]


def test_rollback__only_where_it_may_be_is_a_healthy_checkpoint_kept(tiny_cache: Path, tmp_path: Path) -> None:
    fit(DINO, Scripted({}, policy="stop"), tiny_cache, tmp_path, max_steps=16)
    assert not (tmp_path / "checkpoints" / HEALTHY).exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_rollback__in_half_precision_brings_back_weights_and_scale(
    precision: str, tiny_cache: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"precision": "bf16-mixed"}
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)  # grows several times in the run
    if precision == "fp16":
        given = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    scales: dict[int, float] = {}

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            scales[len(scales)] = scaler.get_scale()

    monitor = Scripted({14: UNIFORM})
    module, data, record, states = recipes.build(DINO), recipes.data_module(tiny_cache), Look(), recipes.States()
    keep = RunCheckpoint(every_n_train_steps=EVERY, dirpath=str(tmp_path / "checkpoints"))
    trainer = recipes.trainer(
        monitor, record, states, keep, max_steps=STEPS, enable_checkpointing=True, default_root_dir=tmp_path, **given
    )
    trainer.fit(module, data)
    assert monitor.rollback.done[0]["to_step"] == 8 and trainer.global_step == STEPS
    assert all(value.isfinite().all() for value in module.state_dict().values())
    if precision == "fp16":
        assert scales[14] == scales[8] < scales[13]


def two_ranks(way: str, cache: Path, out: Path) -> tuple[list[dict[str, Any]], list[bool]]:
    """Return what was done in a run of two ranks of which one goes wrong, and after which batches they were alike."""
    script = Path(__file__).with_name("one_goes_wrong.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(script), way, str(cache), str(out)],
        capture_output=True, text=True, timeout=400, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(out / f"states{rank}.pt", weights_only=True) for rank in range(2)]
    pairs = zip(*ranks, strict=True)
    alike = [all(torch.equal(second[name], value) for name, value in first.items()) for first, second in pairs]
    return [json.loads(line) for line in (out / "actions.jsonl").read_text().splitlines()], alike


@pytest.mark.slow
@pytest.mark.ddp
def test_rollback__two_ranks_whose_teachers_drifted_apart_go_on_from_the_same_weights(
    tiny_cache: Path, tmp_path: Path
) -> None:
    lines, alike = two_ranks("teacher", tiny_cache, tmp_path)
    assert [line["action"] for line in lines] == ["alarm", "rollback"] and lines[0]["alarm"] == "teacher_ranks"
    assert (lines[1]["from_step"], lines[1]["to_step"], lines[1]["lowered"]) == (6, 2, "lr")
    assert alike == [True] * 4 + [False] * 2 + [True] * 8


@pytest.mark.slow
@pytest.mark.ddp
def test_rollback__an_alarm_that_only_the_second_rank_has_rolls_both_back(tiny_cache: Path, tmp_path: Path) -> None:
    lines, alike = two_ranks("centre", tiny_cache, tmp_path)
    alarm, line = lines  # written by the first rank, which had no alarm of its own
    assert alarm["action"] == "alarm" and alarm["alarm"] == "non_finite" and "not finite" in alarm["sentence"]
    assert line["action"] == "rollback" and line["alarms"] == ["non_finite"]
    assert (line["from_step"], line["to_step"], line["lowered"]) == (6, 2, "lr")
    assert alike == [True] * 5 + [False] + [True] * 8


def test_rollback__a_recipe_without_teacher_lowers_the_rate_alone() -> None:
    assert recipes.build(SimMIM).can_ease() == ("lr",)
    assert recipes.build(DINO).can_ease() == ("temperature", "lr")


@pytest.mark.parametrize("kind", recipes.find_recipes(), ids=lambda kind: kind.__name__)
def test_scheduled__lowers_rate_and_every_teacher_temperature(kind: type[Any]) -> None:
    module = recipes.build(kind)
    before = module.scheduled(0.4)
    assert before == module.schedules(0.4)
    module.eased |= {"lr": 0.5, "temperature": 0.25}
    for name, value in module.scheduled(0.4).items():
        factor = 0.5 if name == "lr" else 0.25 if name.startswith("temperature_") else 1.0
        assert value == factor * before[name], name


def test_scheduled__the_temperature_reaches_the_targets(tiny_cache: Path) -> None:
    for kind in (recipe for recipe in recipes.find_recipes() if "temperature" in recipes.build(recipe).can_ease()):
        entropies = []
        for factor in (1.0, 0.3):
            module = recipes.build(kind)
            module.eased["temperature"] = factor
            module.pretrain_loss(module.make_views(recipes.parents(tiny_cache, [0, 1, 2, 3])))
            for term in ("cls", "patch"):
                if f"teacher_{term}" in module.observations:
                    entropies.append(float(torch.special.entr(module.observations[f"teacher_{term}"]).sum(-1).mean()))
        half = len(entropies) // 2
        assert all(low < high for high, low in zip(entropies[:half], entropies[half:], strict=True)), kind


@pytest.mark.parametrize(
    "settings",
    [
        {"max_rollbacks": -1},
        {"lr_factor": 1.0},
        {"policies": {"peaked": "panic"}},
        {"policies": {"peeked": "stop"}},
        {"policies": {"low_rank": "stop"}},
    ],
)
def test_rollback__nonsense_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="collapse_monitor"):
        CollapseMonitor(**settings)
