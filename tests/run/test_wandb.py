"""The W&B logger: whether there is an account, and that it never asks nor tells paths."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agssd.run.wandb import QuietWandbLogger, WandbRun, has_wandb_account


@pytest.fixture
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the netrc file of a machine without a W&B account."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


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
