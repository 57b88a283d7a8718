"""Checkpoints that go to W&B hold the weights and no path; which go, and when, is a choice."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from agssd.cli import main
from agssd.data_modules.cache import VolumeCache
from agssd.data_modules.leakage import overlap, seen_record
from agssd.run.artifacts import TAKEN_OUT, send_checkpoint, without_paths
from agssd.run.resume_rules import differences
from agssd.run.wandb import QuietWandbLogger

SECRET = "DOE_JOHN"


def write_checkpoint(path: Path, step: int) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = {
        "global_step": step,
        "state_dict": {"weight": torch.arange(5.0) + step},
        "optimizer_states": [{"betas": (0.9, 0.95), "state": {0: {"exp_avg": torch.ones(5)}}}],
        "loops": {},
        "config": {"data": {"init_args": {"cache": [f"/scans/{SECRET}.h5"], "seed": 3}}, "model": {"lr": 0.1}},
        "callbacks": {
            "BestCheckpoint": {"best_model_path": f"{SECRET}/best.ckpt", "score": torch.tensor(0.5)},
            "ModelCheckpoint{'monitor': 'train/loss'}": {"best_k_models": {f"/{SECRET}/a": 0.5}, "dirpath": SECRET},
        },
        "datamodule_hyper_parameters": {"cache": f"{SECRET}.h5"},
    }
    torch.save(checkpoint, path)
    return checkpoint


class Run:
    """Takes artifacts as a run of W&B does."""

    id = "a1b2c3d4"

    def __init__(self) -> None:
        self.sent: list[tuple[Any, list[str]]] = []

    def log_artifact(self, artifact: Any, aliases: list[str]) -> None:
        self.sent.append((artifact, aliases))


def logger_of(directory: Path, which: Any) -> tuple[QuietWandbLogger, Run]:
    logger, run = QuietWandbLogger(directory, "agssd", None, "run", False, which), Run()
    logger._experiment = run  # type: ignore[assignment]
    return logger, run


def save(logger: QuietWandbLogger, path: Path, step: int) -> None:
    """Do as a checkpoint callback does: the file is written behind the training, after the logger is told."""
    told: Any = SimpleNamespace(_last_checkpoint_saved=str(path))
    logger.after_save_checkpoint(told)
    write_checkpoint(path, step)


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("none", []),
        ("last", [("step00000030.ckpt", ["last", "step30"])]),
        ("best", [("best.ckpt", ["best", "step20"])]),
        ("all", [
            ("step00000010.ckpt", ["step10"]), ("step00000020.ckpt", ["step20"]),
            ("step00000030.ckpt", ["last", "step30"]), ("best.ckpt", ["best", "step20"]),
        ]),
    ],
)  # fmt: skip
def test_artifacts__which_are_sent(tmp_path: Path, which: str, expected: list[tuple[str, list[str]]]) -> None:
    logger, run = logger_of(tmp_path, which)
    folder = tmp_path / "checkpoints"
    for step in (10, 20, 30):
        save(logger, folder / f"step{step:08d}.ckpt", step)
        if step == 20:
            save(logger, folder / "best.ckpt", step)
    logger.finalize("success")
    assert [(list(artifact.manifest.entries), aliases) for artifact, aliases in run.sent] == [
        ([name], aliases) for name, aliases in expected
    ]
    assert all(artifact.name == "checkpoint-a1b2c3d4" for artifact, _ in run.sent)


def test_artifacts__copy_holds_all_but_paths(tmp_path: Path) -> None:
    logger, run = logger_of(tmp_path, "last")
    path = tmp_path / "checkpoints/step00000007.ckpt"
    save(logger, path, 7)
    logger.finalize("success")
    ((artifact, _),) = run.sent
    (entry,) = artifact.manifest.entries.values()
    content = Path(entry.local_path).read_bytes()
    assert SECRET.encode() not in content and SECRET.encode() in path.read_bytes()
    copy, original = torch.load(entry.local_path, weights_only=True), torch.load(path, weights_only=True)
    assert torch.equal(copy["state_dict"]["weight"], original["state_dict"]["weight"])
    assert copy["optimizer_states"][0]["betas"] == (0.9, 0.95)
    assert copy["config"]["data"]["init_args"] == {"cache": [TAKEN_OUT], "seed": 3}
    assert list(copy["callbacks"]) == list(original["callbacks"])
    assert SECRET not in json.dumps(artifact.manifest.to_manifest_json()) and artifact.metadata == {"step": 7}


def test_artifacts__sent_record_of_what_was_seen_is_the_runs_own(tiny_cache: Path, tmp_path: Path) -> None:
    cache = VolumeCache(tiny_cache)
    rows = [(0, row) for row in range(len(cache.cases))]
    for trial in range(40):  # base64 of random bytes has a separator in most texts
        record = seen_record([cache], rows) | {
            "subjects": base64.b64encode(random.Random(trial).randbytes(800)).decode()
        }
        path = tmp_path / "step00000001.ckpt"
        torch.save(write_checkpoint(path, 1) | {"agssd": {"contract": {"seen": record, "modality": "ct"}}}, path)
        send_checkpoint(Run(), path, tmp_path / "sent", [])
        sent = torch.load(tmp_path / "sent" / path.name, weights_only=True)["agssd"]["contract"]
        assert sent == {"seen": record, "modality": "ct"}
    own = seen_record([cache], rows)
    torch.save(write_checkpoint(path, 1) | {"agssd": {"contract": {"seen": own}}}, path)
    send_checkpoint(Run(), path, tmp_path / "sent", [])
    sent = torch.load(tmp_path / "sent" / path.name, weights_only=True)["agssd"]["contract"]["seen"]
    found = overlap(sent, [cache], rows)
    assert found == overlap(own, [cache], rows) and len(found.subjects) == found.num_subjects


@pytest.mark.parametrize("suffix", ["h5", "ckpt", "yaml", "csv", "json", "nii", "nii.gz", "dcm", "safetensors"])
def test_without_paths__file_names_go_wherever_they_stand(suffix: str) -> None:
    for value in (f"{SECRET}.{suffix}", f"{SECRET}.{suffix.upper()}", f"scans/{SECRET}", Path(SECRET)):
        for name in ("cache", "note", "monitor") if isinstance(value, Path) or "." in value else ("cache", "note"):
            assert without_paths({"a": [{name: value}, {name: (1, value)}]}) == {
                "a": [{name: TAKEN_OUT}, {name: (1, TAKEN_OUT)}]
            }
    assert without_paths({f"{SECRET}.{suffix}": 2}) == {TAKEN_OUT: 2}


@pytest.mark.parametrize(
    "name", ["cache", "dirpath", "folder", "encoder", "quarantine", "default_root_dir", "ckpt_path", "save_dir"]
)
def test_without_paths__settings_that_name_files_lose_every_text(name: str) -> None:
    assert without_paths({"x": {name: SECRET}}) == {"x": {name: TAKEN_OUT}}
    assert without_paths({name: [SECRET, SECRET]}) == {name: [TAKEN_OUT, TAKEN_OUT]}
    assert without_paths({name: None}) == {name: None} and without_paths({name: {"size": 3}}) == {name: {"size": 3}}


def test_without_paths__all_else_stays() -> None:
    value = {
        "class_path": "agssd.methods.dino.DINO", "monitor": "probe/linear_seg_dice", "kind": "own", "b": ("text", 1.5),
        "precision": "bf16-mixed", "train/loss": 0.5, "e": None, "empty": "", "betas": [0.9, 0.95],
    }  # fmt: skip
    assert without_paths(value) == value


def test_artifacts__interrupted_run_sends_nothing_and_a_failure_does_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger, run = logger_of(tmp_path, "last")
    save(logger, tmp_path / "checkpoints/step00000007.ckpt", 7)
    logger.finalize("failed")
    assert not run.sent
    (tmp_path / "checkpoints/step00000007.ckpt").write_bytes(b"torn")
    said: list[str] = []
    monkeypatch.setattr("agssd.run.wandb.rank_zero_info", said.append)
    logger.finalize("success")
    assert not run.sent and "step00000007.ckpt" in said[0] and "not sent" in said[0]


def test_differences__path_that_was_taken_out_is_no_difference() -> None:
    assert list(differences("model", {"encoder": TAKEN_OUT, "lr": 1}, {"encoder": "encoders/ct", "lr": 2})) == [
        "model.lr: 1 in the checkpoint, 2 now"
    ]
    assert not list(differences("model", {"encoder": TAKEN_OUT}, {"encoder": "ct"}))
    assert not list(differences("data.init_args", {"files": [TAKEN_OUT, 1]}, {"files": ["ct.h5", 1]}))
    assert list(differences("data.init_args", {"files": [TAKEN_OUT, 1]}, {"files": ["ct.h5", 2]}))
    assert list(differences("model", {"encoder": "ct"}, {"encoder": "mri"}))
    assert list(differences("model", {"encoder": TAKEN_OUT}, {"encoder": None}))


def records(path: Path) -> Iterator[Any]:
    """Yield the records of a ``.wandb`` file: blocks of 32 KiB of checksum, length, kind, and part of a record."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


@pytest.mark.slow
def test_wandb__offline_run_holds_scalars_artifact_and_system_figures_and_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_X_STATS_SAMPLING_INTERVAL", "0.2")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = QuietWandbLogger(tmp_path, "agssd", None, "run", False, "last")
    logger.log_hyperparams({"lr": 0.25, "cache": f"/scans/{SECRET}.h5"})
    for step in range(3):
        logger.log_metrics({"train/loss": 1.0 / (step + 1)}, step=step)
    save(logger, tmp_path / "checkpoints/step00000003.ckpt", 3)
    logger.finalize("success")
    time.sleep(2)
    logger.experiment.finish()
    wandb.teardown()  # its service ends, and has written everything
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found = list(records(file))
    history = [
        {"".join(item.nested_key) or item.key: json.loads(item.value_json) for item in one.history.item}
        for one in found
        if one.WhichOneof("record_type") == "history"
    ]
    assert [(row["trainer/global_step"], row["train/loss"]) for row in history] == [(0, 1.0), (1, 0.5), (2, 1.0 / 3)]
    (artifact,) = [one.artifact for one in found if one.WhichOneof("record_type") == "artifact"]
    assert [content.path for content in artifact.manifest.contents] == ["step00000003.ckpt"]
    assert {"last", "step3"} <= set(artifact.aliases)
    assert any("cpu" in item.key for one in found for item in one.stats.item)  # system figures are on
    for one in (path for path in tmp_path.glob("wandb/**/*") if path.is_file()):
        assert SECRET.encode() not in one.read_bytes(), one
    assert os.path.exists(artifact.manifest.contents[0].local_path)  # wandb sync finds it


@pytest.mark.slow
def test_fit__whole_configuration_reaches_the_loggers_without_file_names_and_a_sent_copy_goes_on(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.syspath_prepend(str(Path(__file__).parent / "cli_toys"))
    monkeypatch.delenv("AGSSD_RUN_STAMP", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(tiny_cache, f"{SECRET}.h5")
    settings = {
        "model": "toy_recipe.ToyRecipe", "backbone": "toy_recipe.ToyBackbone", "backbone.embed_dim": 5,
        "views": "agssd.transforms.crops.OverlapCrops", "views.size_vox": [16, 16, 16],
        "data": "agssd.data_modules.pretrain.PretrainDataModule", "data.cache": f"{SECRET}.h5",
        "data.parent_vox": [16, 16, 16], "data.global_batch_size": 4, "data.num_workers": 0, "seed_everything": 7,
        "trainer.max_steps": 3, "trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.limit_val_batches": 0,
        "trainer.enable_model_summary": False, "online_probe.at_start": False, "online_probe.at_end": False,
        "checkpoint.every_n_train_steps": 1, "checkpoint.keep_last": 3, "progress.mode": "off", "tensorboard": True,
    }  # fmt: skip
    command = ["fit", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]
    sends = ["--wandb.mode", "offline", "--wandb.log_checkpoints", "all"]
    assert main([*command, *sends, "--trainer.default_root_dir", "run"]) == 0
    wandb.finish()
    wandb.teardown()
    (file,) = Path("run").glob("wandb/offline-run-*/*.wandb")
    sent: dict[str, Any] = {}
    for one in records(file):
        for part in (one.run.config, one.config):
            sent |= {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in part.update}
    kept = yaml.safe_load(Path("run/tensorboard/hparams.yaml").read_text())
    for found in (sent, kept):
        assert found["seed_everything"] == 7 and found["trainer"]["max_steps"] == 3
        assert found["data"]["init_args"]["global_batch_size"] == 4
        assert found["backbone"]["init_args"]["embed_dim"] == 5
        assert found["views"]["init_args"]["size_vox"] == [16, 16, 16]
        assert found["data"]["init_args"]["cache"] == TAKEN_OUT
        assert not {"_instantiator", *found["model"]["init_args"]} & set(found)
    files = [one for place in ("wandb", "tensorboard") for one in Path("run", place).rglob("*") if one.is_file()]
    assert len(files) > 4
    for one in files:
        assert SECRET.encode() not in one.read_bytes(), one
    copy = Path("run/wandb/checkpoints/step00000001.ckpt")
    assert (
        main([*command, "--wandb.mode", "disabled", "--trainer.default_root_dir", "on", "--ckpt_path", str(copy)]) == 0
    )
    ends = [torch.load(f"{run}/checkpoints/step00000003.ckpt", weights_only=True) for run in ("run", "on")]
    assert ends[0]["state_dict"].keys() == ends[1]["state_dict"].keys()
    assert all(torch.equal(value, ends[1]["state_dict"][name]) for name, value in ends[0]["state_dict"].items())
