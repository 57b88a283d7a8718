"""The run directory: names and claims."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from agssd.run.directory import claim, default_run_directory, run_of_checkpoint, unused


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
