"""Checkpoint files: there whole or not at all, read as data only, torn and foreign ones told from those of a run."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from agssd.whole_file import TEMPORARY, sync, whole_file

LAST, BEST, HEALTHY = "last.ckpt", "best.ckpt", "healthy.ckpt"
ASIDE = ".aside"
_OF_STEP = re.compile(r"(?:^|[/\\])step(\d+)\.ckpt$")  # as RunCheckpoint calls them
_SHARDED = "meta.pt"  # what Lightning writes last into the folder of a sharded checkpoint
_PARTS = ("state_dict", "optimizer_states")
_OF_A_RUN = ("loops", "global_step", *_PARTS)


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints behind the training, one after the other, so that a kill at any moment costs none.

    The tensors are copied to host memory before :meth:`save_checkpoint` returns. A thread then writes ``NAME.tmp`` in
    the same folder, syncs it, renames it and syncs the folder. Removals and links wait for the writes before them, and
    are not done if one of these failed, so a file goes only when its successor is on disk. A second save waits for the
    first, so there is never more than one copy in memory, beside what the strategy itself gathers for a save (all of it
    on rank 0 under :class:`agssd.sharding.ShardedStrategy`). What failed is raised by the next call.

    Files are read as data only unless ``weights_only=False`` is said. Addresses that fsspec knows (``s3://...``) work
    as well; what takes the place of the rename there is the store's own commit.

    Args:
        in_background: write in a thread; False writes before a save returns.
    """

    def __init__(self, in_background: bool = True) -> None:
        self.in_background = in_background
        self._writer: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Copy ``checkpoint`` and have it written to ``path``.

        Raises:
            OSError: if an earlier one could not be written.
        """
        if storage_options is not None:
            raise TypeError("storage_options are not supported")
        self.wait()
        copied = apply_to_collection(checkpoint, Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))
        self._do(lambda: self._write(copied, str(path)))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove ``path`` once everything asked for before is on disk."""
        self._do(lambda: super(CheckpointFiles, self).remove_checkpoint(path))

    def link(self, path: str | Path, name: str | Path) -> None:
        """Give the checkpoint ``path`` a second name too, without writing it again where that is possible."""
        self._do(lambda: link_checkpoint(str(path), str(name)))

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None) -> Any:
        """Return the checkpoint, on the CPU, as data only unless ``weights_only`` is False."""
        return super().load_checkpoint(path, map_location, True if weights_only is None else weights_only)

    def wait(self) -> None:
        """Return when everything asked for is on disk.

        Raises:
            OSError: if something could not be written.
        """
        pending, self._pending = self._pending, []
        for task in pending:
            task.result()

    def raise_failure(self) -> None:
        """Raise what has failed by now, without waiting.

        Raises:
            OSError: if something could not be written.
        """
        if any(task.done() and task.exception() for task in self._pending):
            self.wait()

    def teardown(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.shutdown()
                self._writer = None

    def _do(self, task: Callable[[], None]) -> None:
        if not self.in_background:
            task()
            return
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, "checkpoint")
        before = self._pending[-1] if self._pending else None

        def after() -> None:
            if before is None or before.exception() is None:  # done: there is one thread
                task()
            else:
                before.result()

        self._pending.append(self._writer.submit(after))

    def _write(self, checkpoint: dict[str, Any], path: str) -> None:
        try:
            if not is_local(path):
                super().save_checkpoint(checkpoint, path)
                return
            with whole_file(Path(path)) as temporary:
                torch.save(checkpoint, temporary)
        except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
            raise OSError(
                f"the checkpoint {path} could not be written ({str(error).partition(chr(10))[0]}); the ones before it "
                "are untouched: free space or name another --trainer.default_root_dir, and start the same command again"
            ) from error


def link_checkpoint(path: str, name: str) -> None:
    """Give the checkpoint ``path`` a second name, without writing it again where that is possible."""
    if path == name:
        return
    if not is_local(path):
        url_to_fs(path)[0].copy(path, name)
        return
    source, target = Path(path), Path(name)
    if target.exists() and source.samefile(target):
        return
    temporary = target.with_name(target.name + TEMPORARY)
    temporary.unlink(missing_ok=True)
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    if source.is_dir():
        temporary.symlink_to(os.path.relpath(source, target.parent))
        os.replace(temporary, target)
        sync(target.parent)
        return
    try:
        os.link(source, temporary)
        os.replace(temporary, target)
        sync(target.parent)
    except OSError:  # a file system without hard links
        with whole_file(target) as temporary:
            shutil.copyfile(source, temporary)


def is_local(path: str) -> bool:
    """Return whether ``path`` is a file of this machine and no address of fsspec."""
    return isinstance(url_to_fs(path)[0], LocalFileSystem)


def set_aside(path: str) -> str:
    """Rename the checkpoint ``path`` so that no run takes it for one of its own, and return its new name."""
    files, place = url_to_fs(path)
    if isinstance(files, LocalFileSystem):
        os.replace(place, place + ASIDE)
    else:
        files.mv(place, place + ASIDE, recursive=True)
    return os.path.basename(path) + ASIDE


@rank_zero_only
def call_last(path: str, step: int) -> None:
    """Let ``last.ckpt`` be the checkpoint ``path``, of ``step``, where a kill has come in between."""
    last = os.path.join(os.path.dirname(path), LAST)
    try:
        behind = read_checkpoint(last)["global_step"] < step
    except ValueError:
        behind = True
    if behind:
        link_checkpoint(path, last)


def list_checkpoints(folder: str) -> list[str]:
    """Return the paths or addresses of everything called ``*.ckpt`` in ``folder``, which need not exist."""
    files, place = url_to_fs(folder)
    local = isinstance(files, LocalFileSystem)
    try:  # fsspec looks at every file of a local folder, of which one may be renamed at this moment
        names = os.listdir(place) if local else [str(name).rstrip("/") for name in files.ls(place, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = sorted(name for name in names if name.endswith(".ckpt"))
    return [os.path.join(place, name) if local else str(files.unstrip_protocol(name)) for name in names]


def read_checkpoint(path: str) -> dict[str, Any]:
    """Return the dictionary of a checkpoint, loaded as data only; tensors stay on disk where they can.

    Args:
        path: a file, the folder of a sharded checkpoint (whose tensors are left out), or an address of fsspec.

    Raises:
        ValueError: if it is torn or is no checkpoint.
    """
    try:
        if is_local(path):
            file = Path(path)
            sharded = file.is_dir()
            checkpoint = torch.load(file / _SHARDED if sharded else file, "cpu", weights_only=True, mmap=not sharded)
        else:
            files, place = url_to_fs(path)
            sharded = False
            with files.open(place, "rb") as remote:
                checkpoint = torch.load(remote, "cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {str(error).partition(chr(10))[0]}") from error
    needed = [name for name in _OF_A_RUN if not (sharded and name in _PARTS)]
    missing = [name for name in needed if name not in checkpoint] if isinstance(checkpoint, dict) else needed
    if missing:
        raise ValueError(f"{path} is no checkpoint of a run (it has no {', '.join(missing)})")
    return dict(checkpoint)


def check_whole(path: str) -> None:
    """Hold every byte of a checkpoint against the checksums in it, which torch writes and does not read.

    Raises:
        ValueError: if the file is torn or a byte has changed.
    """
    files, place = url_to_fs(path)
    if files.isdir(place):
        return
    try:
        with files.open(place, "rb") as file, zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is torn: {error}") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: its part {damaged} does not fit its checksum")


def newest_checkpoint(folder: str) -> tuple[str, dict[str, Any]] | None:
    """Return path and content of the furthest whole checkpoint of the run in ``folder``; None if there is none at all.

    ``step<N>.ckpt`` are opened from the furthest on until one is whole, under other names all. Torn and foreign files
    that are met are named in one message each and passed over. ``healthy.ckpt``, kept to roll back to, is taken only
    where no other can be, and ``best.ckpt`` after that: it is written in the middle of a step's report, the others
    between two steps. Every rank looks for itself, and so finds the same: there is no process group yet.

    Raises:
        ValueError: if there are checkpoints and none can be used.
    """
    paths = list_checkpoints(folder)
    steps = {path: int(found[1]) for path in paths if (found := _OF_STEP.search(path))}
    spare = [path for name in (HEALTHY, BEST) for path in paths if os.path.basename(path) == name]
    if steps and not is_local(folder):  # a copy of one of them, which would have to be fetched
        spare = [*(path for path in paths if os.path.basename(path) == LAST), *spare]
    refused: list[str] = []
    opened: dict[str, dict[str, Any]] = {}
    for path in paths:
        if path not in steps and path not in spare and not any(_is_same_file(path, other) for other in steps):
            try:
                opened[path] = read_checkpoint(path)
            except ValueError as error:
                refused.append(str(error))
    steps |= {path: int(checkpoint["global_step"]) for path, checkpoint in opened.items()}
    chosen = None
    for path in [*sorted(steps, key=lambda path: (steps[path], path), reverse=True), *spare]:
        try:
            checkpoint = opened[path] if path in opened else read_checkpoint(path)
            check_whole(path)
        except ValueError as error:
            refused.append(str(error))
            continue
        chosen = path, checkpoint
        break
    if refused and chosen is None:
        raise ValueError(
            f"no checkpoint in {folder} can be used: {'; '.join(refused)}. Bring one back from a copy, or name another "
            "--trainer.default_root_dir to start anew"
        )
    for reason in refused:
        rank_zero_info(f"{reason}; it is passed over")
    return chosen


def _is_same_file(path: str, other: str) -> bool:
    try:
        return is_local(path) and os.path.samefile(path, other)
    except OSError:  # one is gone, or a link to nothing
        return False
