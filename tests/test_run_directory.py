"""The run directory: names, claims, metrics that survive a resume, and a W&B logger that never asks nor tells paths."""

from __future__ import annotations

import csv
import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agssd.run_directory import (
    QuietWandbLogger,
    RunCSVLogger,
    WandbRun,
    claim,
    default_run_directory,
    has_wandb_account,
    run_of_checkpoint,
    unused,
)


@pytest.fixture
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the netrc file of a machine without a W&B account."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


@pytest.mark.parametrize("variable", ["SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"])
def test_default_run_directory__is_the_same_on_every_rank_of_a_job(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AGSSD_RUN_STAMP", raising=False)
    monkeypatch.setenv(variable, "4711")
    assert default_run_directory("agssd") == Path("runs/agssd/4711")
    monkeypatch.delenv(variable)
    assert default_run_directory("agssd") == Path("runs/agssd/4711")  # a process started by the first one


def test_run_of_checkpoint__is_the_folder_above_checkpoints() -> None:
    assert run_of_checkpoint("a/run/checkpoints/last.ckpt") == Path("a/run")
    assert run_of_checkpoint("a/last.ckpt") is None


def test_claim__refuses_a_used_directory_unless_resuming(tmp_path: Path) -> None:
    claim(tmp_path / "run", resuming=False)
    claim(tmp_path / "run", resuming=False)  # made, but not used yet
    (tmp_path / "run/checkpoints").mkdir()
    with pytest.raises(ValueError, match="already holds a run"):
        claim(tmp_path / "run", resuming=False)
    claim(tmp_path / "run", resuming=True)


def test_claim__says_so_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(PermissionError, match="no permission to write"):
        claim(tmp_path / "run", resuming=False)


def test_claim__place_that_cannot_be_made_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/run cannot be made: .*name another --trainer.default_root_dir"):
        claim(tmp_path / "file" / "run", resuming=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_claim__real_directory_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(OSError, match="run"):
        claim(tmp_path / "run", resuming=False)


def test_unused__counts_up(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        path = unused(tmp_path / "config.yaml")
        path.touch()
        names.append(path.name)
    assert names == ["config.yaml", "config-2.yaml", "config-3.yaml"]


def test_metrics__every_row_is_on_disk_at_once_and_survives_a_resume(tmp_path: Path) -> None:
    def rows() -> list[dict[str, str]]:
        with (tmp_path / "metrics.csv").open() as file:
            return list(csv.DictReader(file))

    first = RunCSVLogger(tmp_path)
    first.log_metrics({"train/loss": 3.0}, step=0)
    first.log_metrics({"train/loss": 2.0}, step=1)
    assert [row["train/loss"] for row in rows()] == ["3.0", "2.0"]  # without finalize: a killed run keeps its rows
    second = RunCSVLogger(tmp_path)
    second.log_metrics({"train/loss": 1.0}, step=2)
    second.log_metrics({"train/loss": 0.5, "val/loss": 4.0}, step=3)
    assert [(row["step"], row["train/loss"], row["val/loss"]) for row in rows()] == [
        ("0", "3.0", ""),
        ("1", "2.0", ""),
        ("2", "1.0", ""),
        ("3", "0.5", "4.0"),
    ]


def table(path: Path) -> list[tuple[int, str]]:
    with path.open(newline="") as file:
        return [(int(row["step"]), row["train/loss"]) for row in csv.DictReader(file)]


def test_metrics__rows_of_an_interrupted_part_are_taken_out_and_a_torn_line_too(tmp_path: Path) -> None:
    first = RunCSVLogger(tmp_path)
    for step in range(5):
        first.log_metrics({"train/loss": float(step)}, step=step)
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text() + "9.0")  # the power failed in the middle of a row
    second = RunCSVLogger(tmp_path)
    second.rewind(3)
    assert table(path) == [(0, "0.0"), (1, "1.0"), (2, "2.0")]
    second.log_metrics({"train/loss": 30.0}, step=3)
    assert table(path) == [(0, "0.0"), (1, "1.0"), (2, "2.0"), (3, "30.0")]
    RunCSVLogger(tmp_path).rewind(9)
    assert len(table(path)) == 4
    RunCSVLogger(tmp_path).rewind(0)  # killed before the first checkpoint
    assert not path.exists()


def test_metrics__a_new_column_never_leaves_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = RunCSVLogger(tmp_path)
    logger.log_metrics({"train/loss": 1.0}, step=0)

    def killed(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        logger.log_metrics({"train/loss": 2.0, "val/loss": 3.0}, step=1)
    assert table(tmp_path / "metrics.csv") == [(0, "1.0")]


def test_has_wandb_account__by_key_or_netrc(no_account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_wandb_account()
    no_account.write_text("machine elsewhere login a password b\n")
    assert not has_wandb_account()
    no_account.write_text("machine api.wandb.ai login user password none\n")
    assert has_wandb_account()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org/")
    assert not has_wandb_account()
    monkeypatch.setenv("WANDB_API_KEY", "none")
    assert has_wandb_account()


@pytest.mark.parametrize(
    ("configured", "environment", "expected"),
    [
        (None, None, "offline"),
        (None, "online", "online"),
        ("offline", "online", "offline"),
        ("online", None, "online"),
        ("disabled", None, None),
        (None, "disabled", None),
    ],
)
def test_wandb_run__mode_is_configuration_then_environment_then_account(
    no_account: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    configured: Any,
    environment: str | None,
    expected: str | None,
) -> None:
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    logger = WandbRun(mode=configured).logger(tmp_path)
    assert (logger._wandb_init["mode"] if logger else None) == expected


def test_quiet_wandb_logger__sends_no_command_line_code_or_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    calls: list[dict[str, Any]] = []
    sent: dict[str, Any] = {}

    def init(**settings: Any) -> Any:
        calls.append(settings)
        return SimpleNamespace(config=SimpleNamespace(update=lambda params, **_: sent.update(params)))

    monkeypatch.setattr(wandb, "init", init)
    logger = QuietWandbLogger(tmp_path / "run", "agssd", None, "run", online=False)
    assert not (tmp_path / "run").exists()  # nothing is written before the run starts
    logger.log_hyperparams({"lr": 0.1, "data": {"cache": ["/scans/doe_john.h5"], "kind": "mri"}})
    assert sent == {"lr": 0.1, "data": {"cache": ["<path>"], "kind": "mri"}}
    settings = calls[0]["settings"]
    assert settings.x_disable_meta and settings.disable_code and settings.disable_git and settings.console == "off"
    again = QuietWandbLogger(tmp_path / "run", "agssd", None, "run", online=False)
    again.log_hyperparams({})
    assert calls[1]["id"] == calls[0]["id"]  # a resumed run goes on with the same curves


def test_quiet_wandb_logger__goes_offline_when_the_service_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    modes: list[str] = []

    def init(**settings: Any) -> Any:
        modes.append(settings["mode"])
        if settings["mode"] == "online":
            raise wandb.errors.CommError("no route")
        return SimpleNamespace()

    monkeypatch.setattr(wandb, "init", init)
    assert QuietWandbLogger(tmp_path, "agssd", None, "run", online=True).experiment is not None
    assert modes == ["online", "offline"]
