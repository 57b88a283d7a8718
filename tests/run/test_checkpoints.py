"""Checkpoint files: whole or absent, in order, and told apart from torn and foreign ones."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from agssd.run import checkpoints
from agssd.run.checkpoints import CheckpointFiles, check_whole, newest_checkpoint, read_checkpoint


def state(step: int) -> dict[str, Any]:
    weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
    return {"state_dict": {"w": weights}, "optimizer_states": [], "loops": {}, "global_step": step}


@pytest.fixture
def files() -> Iterator[CheckpointFiles]:
    files = CheckpointFiles()
    yield files
    files.teardown()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Return what is told the user."""
    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
    return caplog


def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Return an event for which every write waits."""
    release, save = threading.Event(), torch.save

    def late(*given: Any) -> None:
        assert release.wait(30)
        save(*given)

    monkeypatch.setattr(torch, "save", late)
    return release


def test_save__holds_the_values_of_the_moment_it_was_asked(
    files: CheckpointFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, kept = held(monkeypatch), state(1)
    before = kept["state_dict"]["w"].clone()
    files.save_checkpoint(kept, tmp_path / "a.ckpt")
    kept["state_dict"]["w"].zero_()  # the next optimiser step
    kept["loops"]["later"] = 1
    release.set()
    files.wait()
    saved = files.load_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(saved["state_dict"]["w"], before) and saved["loops"] == {}


def test_save__returns_while_the_file_is_still_to_be_written(
    files: CheckpointFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old.ckpt").touch()
    release = held(monkeypatch)
    files.save_checkpoint(state(1), tmp_path / "new.ckpt")
    files.link(tmp_path / "new.ckpt", tmp_path / "last.ckpt")
    files.remove_checkpoint(tmp_path / "old.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["old.ckpt"]  # it goes when its successor is there
    release.set()
    files.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "new.ckpt"]
    assert (tmp_path / "last.ckpt").samefile(tmp_path / "new.ckpt")


@pytest.mark.parametrize("in_background", [True, False])
@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("[enforce fail at inline_container.cc] unexpected"),
    ],
)
def test_save__full_disk_costs_no_older_checkpoint_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: bool, failure: Exception
) -> None:
    files = CheckpointFiles(in_background)
    files.save_checkpoint(state(1), tmp_path / "old.ckpt")
    files.wait()

    def full(checkpoint: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        OSError, match=r"new.ckpt could not be written .*; the ones before it are untouched: free space"
    ):
        files.save_checkpoint(state(2), tmp_path / "new.ckpt")
        files.remove_checkpoint(tmp_path / "old.ckpt")
        while not files._pending[-1].done():
            pass
        files.raise_failure()
    files.teardown()
    assert [path.name for path in tmp_path.iterdir()] == ["old.ckpt"]


def test_save__content_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle: int) -> None:
        order.append("sync " + Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def watched_replace(source: Path, target: Path) -> None:
        order.append(f"{Path(source).name} becomes {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    CheckpointFiles(in_background=False).save_checkpoint(state(1), tmp_path / "a.ckpt")
    assert order == ["sync a.ckpt.tmp", "a.ckpt.tmp becomes a.ckpt", f"sync {tmp_path.name}"]


def test_link__copies_where_a_file_system_has_no_links(
    files: CheckpointFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*given: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "no links")

    monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "last.ckpt").write_text("an older one")
    files.save_checkpoint(state(3), tmp_path / "a.ckpt")
    files.link(tmp_path / "a.ckpt", tmp_path / "last.ckpt")
    files.wait()
    assert (tmp_path / "last.ckpt").read_bytes() == (tmp_path / "a.ckpt").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def damage(path: Path, kind: str) -> None:
    """Make a checkpoint of step 3 one that must not be used."""
    whole = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "torn":
        path.write_bytes(whole[: int(0.7 * len(whole))])
    elif kind == "flipped":  # torch.load does not notice
        weights = torch.load(path, weights_only=True)["state_dict"]["w"].numpy().tobytes()
        place = whole.index(weights) + len(weights) // 2
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert torch.load(path, weights_only=True)["global_step"] == 3
    elif kind == "foreign":
        torch.save({"model": {"w": torch.zeros(2)}}, path)
    elif kind == "weights":
        torch.save({"state_dict": {"w": torch.zeros(2)}, "global_step": 3}, path)
    else:
        path.write_bytes(pickle.dumps(Path("code")))


@pytest.mark.parametrize("kind", ["empty", "torn", "flipped", "foreign", "weights", "code"])
def test_newest_checkpoint__torn_or_foreign_is_named_and_the_one_before_is_taken(
    kind: str, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        torch.save(state(step), tmp_path / f"step{step:08d}.ckpt")
    os.link(tmp_path / "step00000003.ckpt", tmp_path / "last.ckpt")
    found = newest_checkpoint(str(tmp_path))
    assert found is not None and found[1]["global_step"] == 3
    assert not said.messages
    (tmp_path / "last.ckpt").unlink()
    damage(tmp_path / "step00000003.ckpt", kind)
    found = newest_checkpoint(str(tmp_path))
    assert found is not None and Path(found[0]).name == "step00000002.ckpt" and found[1]["global_step"] == 2
    (message,) = said.messages
    assert "step00000003.ckpt" in message and message.endswith("it is passed over")


@pytest.mark.parametrize("at", ["disk", "memory://lazy/checkpoints"])
def test_newest_checkpoint__opens_the_furthest_alone_where_it_is_whole(
    at: str, files: CheckpointFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path) if at == "disk" else at
    for step in (9, 10, 11):
        files.save_checkpoint(state(step), f"{folder}/step{step}.ckpt")  # 9 comes last by name
    files.link(f"{folder}/step11.ckpt", f"{folder}/last.ckpt")
    for name in ("healthy", "best"):
        files.save_checkpoint(state(12), f"{folder}/{name}.ckpt")
    files.wait()
    opened: list[str] = []
    for call in (read_checkpoint, check_whole):

        def watched(path: str, call: Any = call) -> Any:
            opened.append(Path(path).name)
            return call(path)

        monkeypatch.setattr(checkpoints, call.__name__, watched)
    found = newest_checkpoint(folder)
    assert found is not None and Path(found[0]).name == "step11.ckpt" and found[1]["global_step"] == 11
    assert opened == ["step11.ckpt"] * 2


def test_newest_checkpoint__another_name_counts_by_its_content(tmp_path: Path) -> None:
    torch.save(state(4), tmp_path / "step00000004.ckpt")
    torch.save(state(6), tmp_path / "last.ckpt")
    torch.save(state(8), tmp_path / "healthy.ckpt")
    found = newest_checkpoint(str(tmp_path))
    assert found is not None and Path(found[0]).name == "last.ckpt" and found[1]["global_step"] == 6
    torch.save(state(7), tmp_path / "before_step5.ckpt")
    found = newest_checkpoint(str(tmp_path))
    assert found is not None and found[1]["global_step"] == 7


def test_newest_checkpoint__best_is_the_last_resort_and_nothing_usable_is_refused(tmp_path: Path) -> None:
    assert newest_checkpoint(str(tmp_path / "none")) is None
    assert newest_checkpoint(str(tmp_path)) is None
    torch.save(state(9), tmp_path / "best.ckpt")
    torch.save(state(4), tmp_path / "last.ckpt")
    found = newest_checkpoint(str(tmp_path))
    assert found is not None and Path(found[0]).name == "last.ckpt"
    damage(tmp_path / "last.ckpt", "torn")
    found = newest_checkpoint(str(tmp_path))
    assert found is not None and Path(found[0]).name == "best.ckpt"
    damage(tmp_path / "best.ckpt", "torn")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be used: .*another --trainer.default_root_dir"):
        newest_checkpoint(str(tmp_path))


def test_checkpoints__work_at_an_address_too(files: CheckpointFiles) -> None:
    folder = "memory://run/checkpoints"
    for step in (1, 2):
        files.save_checkpoint(state(step), f"{folder}/step{step:08d}.ckpt")
    files.link(f"{folder}/step00000002.ckpt", f"{folder}/last.ckpt")
    files.remove_checkpoint(f"{folder}/step00000001.ckpt")
    files.wait()
    found = newest_checkpoint(folder)
    assert found is not None and found[0].startswith("memory://") and found[1]["global_step"] == 2
    assert torch.equal(files.load_checkpoint(found[0])["state_dict"]["w"], state(2)["state_dict"]["w"])
    check_whole(found[0])
    store = fsspec.filesystem("memory")
    assert sorted(store.ls("/run/checkpoints", detail=False)) == [
        "/run/checkpoints/last.ckpt",
        "/run/checkpoints/step00000002.ckpt",
    ]
    with store.open("/run/checkpoints/code.ckpt", "wb") as file:
        torch.save({**state(5), "code": Path("x")}, file)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        read_checkpoint(f"{folder}/code.ckpt")  # data only
    with pytest.raises(pickle.UnpicklingError):
        files.load_checkpoint(f"{folder}/code.ckpt")
