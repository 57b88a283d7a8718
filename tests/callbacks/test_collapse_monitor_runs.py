"""Real trainings that are made to collapse, each in its own way, raise the alarm of that way; a sound one does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import recipes
import torch
from torch import Tensor, nn

from agssd.callbacks.collapse_monitor import CollapseMonitor
from agssd.callbacks.ema_teacher import EMATeacher
from agssd.callbacks.run_checkpoint import RunCheckpoint
from agssd.methods.agssd import AGSSD
from agssd.methods.base import PretrainModule
from agssd.methods.dino import DINO
from agssd.methods.dinov2 import DINOv2
from agssd.methods.ibot import IBOT

STEPS = 60


def train(
    kind: type[Any],
    cache: Path,
    out: Path,
    edit: Callable[[Any, dict[str, Any]], None] | None = None,
    monitor: dict[str, Any] | None = None,
    steps: int = STEPS,
    callbacks: tuple[L.Callback, ...] = (),
    momentum: tuple[float | None, float] = (0.8, 1.0),
    **settings: Any,
) -> tuple[Any, list[dict[str, Any]], L.Trainer]:
    """Return the module, what was done about it, and the trainer of a run whose batches are edited."""

    class Edited(kind):  # type: ignore[misc, valid-type]
        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            if edit is not None and self.trainer.training:
                edit(self, batch)
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

    own = {"every_n_steps": 10, "min_samples": 24, "grace": 0.3, "uniform_steps": 20} | (monitor or {})
    module = recipes.build(Edited, **settings)
    trainer = recipes.trainer(
        EMATeacher(*momentum), CollapseMonitor(**own), *callbacks, teacher=False, max_steps=steps,
        default_root_dir=out, enable_checkpointing=bool(callbacks),
    )  # fmt: skip
    trainer.fit(module, recipes.data_module(cache))
    path = out / "actions.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return module, done, trainer


def alarms(actions: list[dict[str, Any]]) -> set[str]:
    return {action["alarm"] for action in actions if action["action"] == "alarm"}


def constant(module: Any, batch: dict[str, Any]) -> None:
    """Air everywhere."""
    batch["image"].zero_()
    batch["foreground"].fill_(1)


def twins(module: Any, batch: dict[str, Any]) -> None:
    """Every crop twice in its batch: same voxels, same draws."""
    for value in batch.values():
        value[1::2] = value[0::2]


def three_scans(module: Any, batch: dict[str, Any]) -> None:
    """Three crops for the whole run."""
    if not hasattr(module, "kept"):
        module.kept = {name: value[:3].clone() for name, value in batch.items()}
    rows = torch.arange(len(batch["sample"])) % 3
    for name, value in batch.items():
        value.copy_(module.kept[name][rows])


class Misplaced(AGSSD):
    """Believes the second view to be cut mirrored."""

    def make_views(self, batch: Any) -> Any:
        views = super().make_views(batch)
        views.geometry.globals.affine[:, 1, :3, :3] *= -1
        return views


class Copy(nn.Module):
    """Hands on the token of the other view that lies nearest, and [CLS], which lies nowhere, as it is."""

    def forward(
        self, query: Tensor, memory: Tensor, bias: Tensor | None = None, forbidden: Tensor | None = None
    ) -> Tensor:
        if bias is None:
            return query
        nearest = bias.argmax(-1)[..., None].expand(-1, -1, memory.shape[-1])
        return memory.gather(1, nearest).to(query.dtype)


class Copying(AGSSD):
    """Has a fuser that takes what is hidden from where it can be seen."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.student["fuser"], self.teacher["fuser"] = Copy(), Copy()


class Placeless(IBOT):
    """Does not tell its tokens where they lie."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for network in (self.student, self.teacher):
            network["backbone"].position_scale = 0.0


def lost_patch_centre(module: Any, batch: dict[str, Any]) -> None:
    """A centre that lets one prototype win every patch."""
    module.centre_patch.centre[..., 0] = -100.0


SOUND: dict[type[Any], dict[str, Any]] = {
    DINO: {"centre_rule": "balance", "head_centring": True, "lr": 1e-4, "temperature_teacher": (0.04, 0.04)},
    DINOv2: {"weight_koleo": 1.0, "monitor": {"max_gradient_ratio": 100.0}},
    IBOT: {
        "centre_rule": "balance", "head_centring": True, "lr": 1e-4, "shared_head": False, "views": {"num_local": 0},
    },
    AGSSD: {
        "assignment": "balance", "head_centring": True, "lr": 1e-5, "weight_reconstruction": 1e3,
        "weight_cls": 0.2, "weight_patch": 1.0, "weight_align": 30.0,
        "student_views": "both", "masked_views": 1, "mask_ratio": (0.3, 0.7), "distilled_share": 1.0,
        "temperature_student": 0.04, "temperature_patch": (0.02, 0.02),
        "views": {"overlap": (0.95, 1.0), "num_local": 0},
    },
}  # fmt: skip
# What is done to a sound run, by the alarm that it must raise.
WAYS: list[tuple[str, type[Any], dict[str, Any]]] = [
    ("cls_uniform", DINO, {"temperature_teacher": (2.0, 2.0), "temperature_student": 1.0}),
    ("cls_peaked", DINO, {"centre_rule": "mean", "centre_momentum": 1.0, "head_centring": False, "lr": 3e-3,
                          "temperature_teacher": (0.01, 0.01)}),
    ("cls_peaked", DINO, {"centre_rule": "mean", "centre_momentum": 1.0, "head_centring": False, "edit": constant,
                          "temperature_teacher": (0.1, 0.1)}),
    ("cls_uninformative", DINO, {"centre_rule": "mean", "centre_momentum": 1.0, "head_centring": False,
                                 "edit": constant, "temperature_teacher": (0.3, 0.3)}),
    ("cls_features_lost", DINO, {"edit": constant}),
    ("cls_duplicates", DINO, {"edit": twins, "monitor": {"max_cosine": 2.0, "hard_rank": 0.0}}),
    ("cls_low_rank", DINO, {"edit": three_scans}),
    ("teacher_equal", DINO, {"momentum": (0.0, 0.0)}),
    ("cls_low_spread", DINOv2, {"weight_koleo": 0.0, "lr": 1e-8, "min_lr": 1e-9}),
    ("patch_uniform", DINOv2, {"temperature_teacher": (2.0, 2.0), "temperature_student": 1.0}),
    ("patch_low_rank", DINOv2, {"edit": constant, "weight_koleo": 0.0}),
    ("patch_peaked", IBOT, {"edit": lost_patch_centre}),
    ("patch_features_lost", Placeless, {"edit": constant}),
    ("patch_uninformative", IBOT, {"temperature_patch": (1.0, 1.0)}),
    ("patch_low_spread", IBOT, {"edit": constant}),
    ("gradient_ratio", AGSSD, {"weight_reconstruction": 1e6}),
    ("correspondence_lost", Misplaced, {}),
    ("fuser_copies", Copying, {}),
]  # fmt: skip
SHORT = (3, 6, 13, 17)  # of each kind of output one; the others run with the slow tests


def settings_of(kind: type[Any], changed: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a sound run of the recipe, with what is changed."""
    sound = next(settings for of, settings in SOUND.items() if issubclass(kind, of))
    return sound | changed


@lru_cache
def alarms_of_sound(kind: type[Any], cache: Path, out: Path) -> frozenset[str]:
    """Return every alarm of a run that nothing was done to."""
    return frozenset(alarms(train(kind, cache, out, **SOUND[kind])[1]))


@pytest.fixture(scope="module")
def sound(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[type[Any]], frozenset[str]]:
    folder = tmp_path_factory.mktemp("sound")

    def look(kind: type[Any]) -> frozenset[str]:
        known = next(of for of in SOUND if issubclass(kind, of))
        return alarms_of_sound(known, tiny_cache, folder / known.__name__)

    return look


@pytest.mark.parametrize(
    ("name", "kind", "changed"),
    [
        pytest.param(*way, id=f"{way[0]}-{n}", marks=() if n in SHORT else pytest.mark.slow)
        for n, way in enumerate(WAYS)
    ],
)
def test_collapse__a_run_made_to_collapse_raises_its_alarm_and_a_sound_one_does_not(
    name: str, kind: type[Any], changed: dict[str, Any], sound: Any, tiny_cache: Path, tmp_path: Path
) -> None:
    _, done, trainer = train(kind, tiny_cache, tmp_path, **settings_of(kind, changed))
    assert name in alarms(done), alarms(done)
    assert name not in sound(kind)
    assert trainer.global_step == STEPS, "the policy is to warn"


# ------------------------------------------------------------------ actions

BEGINS = 25
BREAKS = 26  # not where a checkpoint is saved, which is when the next batch has come


class Heated(PretrainModule):
    """Has a teacher from some step on whose outputs are uniform while the temperature in use is above a limit."""

    starts_at, limit = 0.06, 0.05

    def schedules(self, progress: float) -> dict[str, float]:
        values = super().schedules(progress)
        return values | ({"temperature_teacher": self.starts_at} if progress * STEPS >= BEGINS else {})

    def scheduled(self, progress: float) -> dict[str, float]:
        values = super().scheduled(progress)
        return values | ({"temperature_teacher": 2.0} if values["temperature_teacher"] > self.limit else {})


class HotTeacher(Heated, DINO):
    """Needs to be cooled once."""


class HotPatchTeacher(Heated, DINOv2):
    """The same, its patches' outputs too; the student's are as flat, but only then."""

    def scheduled(self, progress: float) -> dict[str, float]:
        values = super().scheduled(progress)
        self.temperature_student = 1.0 if values["temperature_teacher"] > 1 else 0.04
        return values


class HotterTeacher(HotTeacher):
    """Needs to be cooled twice, with a lower rate in vain between."""

    starts_at = 0.1


class HottestTeacher(HotTeacher):
    """Cannot be cooled in three rollbacks."""

    starts_at = 0.2


def drawn(module: Any) -> int:
    """Return how many batches were drawn before this one; a rollback does not draw them again."""
    module.batches = getattr(module, "batches", -1) + 1
    return int(module.batches)


def stretch_of_air(module: Any, batch: dict[str, Any]) -> None:
    """Batches up to the alarm are air; they are not met again after a rollback."""
    if BEGINS <= drawn(module) < RINGS["cls_features_lost"][0]:
        constant(module, batch)


# What these break once stays broken, unless a rollback mends it.


def centre_breaks(module: Any, batch: dict[str, Any]) -> None:
    if drawn(module) == BREAKS:
        module.centre.centre[..., 0] = -100.0


def patch_centre_breaks(module: Any, batch: dict[str, Any]) -> None:
    if drawn(module) == BREAKS:
        lost_patch_centre(module, batch)


def teacher_breaks(module: Any, batch: dict[str, Any]) -> None:
    """Prototypes of the teacher that are no numbers; the guard withholds every step and cannot help."""
    if drawn(module) == BREAKS:
        module.teacher["head"].prototypes.data.fill_(float("nan"))


HARD: dict[str, dict[str, Any]] = {
    "cls_uniform": {"kind": HotTeacher, "temperature_student": 1.0},
    "cls_peaked": {"kind": DINO, "edit": centre_breaks},
    "cls_features_lost": {"kind": DINO, "edit": stretch_of_air},
    "patch_uniform": {
        "kind": HotPatchTeacher,
        "temperature_teacher": (0.04, 0.04),
        "temperature_student": 0.04,
        "monitor": {"uniform_margin": 0.02, "max_gradient_ratio": 1e6},
    },
    "patch_peaked": {"kind": IBOT, "edit": patch_centre_breaks},
    "patch_features_lost": {"kind": Placeless, "edit": stretch_of_air},
    "non_finite": {"kind": DINO, "edit": teacher_breaks},
}
# The reports that may ring first: uniform outputs must have lasted, withheld steps are left out of the first report,
# and its rows of patches, which come in unequal numbers, may all be from before.
RINGS = {
    "cls_uniform": (40,),
    "cls_peaked": (30,),
    "cls_features_lost": (30,),
    "patch_uniform": (40, 50),
    "patch_peaked": (30, 40),
    "patch_features_lost": (30,),
    "non_finite": (40,),
}


def run_hard(
    name: str, policy: str, cache: Path, out: Path, **given: Any
) -> tuple[Any, list[dict[str, Any]], L.Trainer]:
    keep = RunCheckpoint(every_n_train_steps=5, dirpath=str(out / "checkpoints"))
    own = {
        "policy": policy,
        "uniform_steps": 10,
        "uniform_margin": 0.1,
        "min_feature_std": 0.0,
        "min_information": 0.0,
        "grace": 0.1,
    }
    settings = settings_of(HARD[name]["kind"], HARD[name])
    settings |= {"monitor": own | settings.get("monitor", {})} | given
    return train(cache=cache, out=out, callbacks=(keep,), **settings)


# the others only in `make test-slow`: what follows an alarm is the same for each
FIRST = [pytest.param(name, marks=pytest.mark.slow if number else ()) for number, name in enumerate(HARD)]


@pytest.mark.parametrize("name", FIRST)
def test_collapse__stops_a_run_that_collapses(name: str, tiny_cache: Path, tmp_path: Path) -> None:
    _, done, trainer = run_hard(name, "stop", tiny_cache, tmp_path)
    (stop,) = (one for one in done if one["action"] == "stop")
    assert name in stop["alarms"] and stop["step"] == trainer.global_step in RINGS[name]
    (monitor,) = (one for one in trainer.callbacks if isinstance(one, CollapseMonitor))
    assert stop["reason"] == monitor.stopped
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == stop["step"], "what is there to look at is kept"


@pytest.mark.parametrize("name", FIRST)
def test_collapse__rolls_a_run_back_that_collapses_and_it_recovers(name: str, tiny_cache: Path, tmp_path: Path) -> None:
    module, done, trainer = run_hard(name, "rollback", tiny_cache, tmp_path)
    (rollback,) = (one for one in done if one["action"] == "rollback")
    assert name in rollback["alarms"] and rollback["to_step"] <= BEGINS and rollback["from_step"] in RINGS[name]
    lowered = "temperature" if name.endswith("_uniform") else "lr"
    assert rollback["lowered"] == lowered and module.eased[lowered] < 1 and trainer.global_step == STEPS
    assert done[-1] == rollback, "no alarm after it"
    assert all(value.isfinite().all() for value in module.state_dict().values())


@pytest.mark.parametrize(
    ("kind", "ends"), [(HotterTeacher, ""), (HottestTeacher, "max_rollbacks is 3, and as many were made")]
)
def test_collapse__is_rolled_back_until_it_is_cured_or_stopped(
    kind: type[Any], ends: str, tiny_cache: Path, tmp_path: Path
) -> None:
    module, done, trainer = run_hard("cls_uniform", "rollback", tiny_cache, tmp_path, kind=kind)
    assert [one["lowered"] for one in done if one["action"] == "rollback"] == ["temperature", "lr", "temperature"]
    assert module.eased == {"temperature": pytest.approx(0.7**2), "lr": 0.5}
    (monitor,) = (one for one in trainer.callbacks if isinstance(one, CollapseMonitor))
    assert bool(monitor.stopped) == bool(ends) and ends in monitor.stopped
    assert trainer.global_step == (RINGS["cls_uniform"][0] if ends else STEPS)
