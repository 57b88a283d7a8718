"""The folder in which a cache comes into being: parts of any number of processes, then one deterministic merge.

``NAME.build`` lies beside the cache ``NAME`` and holds ``parts/``, the plan of all jobs, locks, and while merging
``merged/``. Every file in it appears whole or not at all, so that a build may be killed at any moment: the next one
goes on from what stands there. The bytes of the cache follow from the cases alone, which are ordered by key; neither
workers nor shards nor interruptions change them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from agssd.data_modules.build import CacheWriter, resolve_splits
from agssd.data_modules.cache import FORMAT, INDEX_NAME, VERSION, CaseInfo
from agssd.data_modules.parts import Part, is_full, read_part, write_whole
from agssd.whole_file import sync

SHARD_SUFFIX = ".h5"


def build_path(out: Path) -> Path:
    """Return the folder in which the cache ``out`` comes into being."""
    return out.with_name(f"{out.name}.build")


@dataclass(frozen=True)
class Shard:
    """One of ``count`` processes that share a build, ``number`` from 0 on; it does every ``count``-th job."""

    number: int
    count: int


class BuildFolder:
    """Holds the build of one cache; use as a context manager, so that two builds do not meet.

    A whole build and a merge hold the folder alone; shards hold it together, each its own number alone. The locks end
    with the process, however it ends.

    Args:
        out: the cache that is to be.
        shard: the shard that this process does, or None for a whole build or a merge.

    Raises:
        ValueError: on entering, if another process builds the same cache or shard, or the folder cannot be written.
    """

    def __init__(self, out: Path, shard: Shard | None = None) -> None:
        """Touch nothing yet."""
        self.out = out
        self.shard = shard
        self.path = build_path(out)
        self.parts = self.path / "parts"
        self.locked = False
        self._locks: list[int] = []

    def __enter__(self) -> BuildFolder:
        """Make the folder where there is none, and lock it."""
        try:
            self._make()
            self.locked = self._lock("lock", fcntl.LOCK_EX if self.shard is None else fcntl.LOCK_SH)
            if self.shard is not None:
                self._lock(f"lock-{self.shard.number}", fcntl.LOCK_EX)
        except OSError as error:
            self._unlock()
            raise ValueError(f"cannot write into {self.path}: {error.strerror}") from error
        except ValueError:
            self._unlock()
            raise
        if self.shard is None:  # alone here: what a killed process was writing is of no use
            for half in self.path.glob("**/.*.part"):
                half.unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Unlock the folder; it stays, unless ``remove`` was called, or nothing is in it."""
        if self.path.is_dir() and self.shard is None and not any(self.parts.iterdir()):
            self.remove()
        self._unlock()

    def _make(self) -> None:
        self.path.mkdir(exist_ok=True)
        self.parts.mkdir(exist_ok=True)

    def _lock(self, name: str, kind: int) -> bool:
        """Lock a file of the folder; return False where the file system keeps no locks."""
        path = self.path / name
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                what = "the same shard" if name != "lock" else "it"
                raise ValueError(
                    f"{self.path} is in use: another process builds {what} now; wait for its end, or choose another "
                    "--out"
                ) from None
            except OSError:
                self._locks.append(handle)
                return False
            try:
                same = os.fstat(handle).st_ino == path.stat().st_ino
            except FileNotFoundError:  # the build that had it has ended and has taken its folder away
                self._make()
                same = False
            if same:
                self._locks.append(handle)
                return True
            os.close(handle)

    def _unlock(self) -> None:
        while self._locks:
            os.close(self._locks.pop())

    def ready(self) -> list[str]:
        """Return the digests of the parts that are there."""
        return [path.stem for path in self.parts.glob("*.h5")]

    def remove(self) -> None:
        """Take the folder away, with all that is in it; last what says that the cache is in place."""
        for _ in range(10):  # an orphan of a killed build may still leave a part
            for path in (self.parts, self.path / "merged", self.path / "replaced"):
                shutil.rmtree(path, ignore_errors=True)
            last = ("layout.json", "publishing")
            for path in sorted(self.path.glob("*"), key=lambda path: path.name in last):
                if path.name != "publishing":
                    path.unlink(missing_ok=True)
            shutil.rmtree(self.path, ignore_errors=True)
            if not self.path.exists():
                return
        raise ValueError(f"cannot remove {self.path}; the cache is complete, delete the folder yourself")

    def refusals(self) -> Counter[str]:
        """Return how many jobs were refused, by reason."""
        return Counter(json.loads(path.read_bytes())["reason"] for path in self.parts.glob("*.refused"))

    # ------------------------------------------------------------------- plan

    @property
    def _plan_path(self) -> Path:
        return self.path / "plan.json"

    def write_plan(self, digests: Sequence[str], class_names: Sequence[str], salt_fingerprint: str | None) -> None:
        """State all jobs in their order; the shards of one build must agree on it.

        Raises:
            ValueError: another shard has stated another plan.
        """
        plan = {"jobs": list(digests), "class_names": list(class_names), "salt_fingerprint": salt_fingerprint}
        text = json.dumps(plan).encode()
        if self.shard is not None and self._plan_path.is_file() and self._plan_path.read_bytes() != text:
            raise ValueError(
                f"another shard in {self.path} was begun with other sources, files or settings; give all shards the "
                "same arguments, or delete that folder to start anew"
            )
        write_whole(self._plan_path, text)

    def read_plan(self) -> dict[str, Any]:
        """Return ``jobs``, ``class_names`` and ``salt_fingerprint``.

        Raises:
            ValueError: there is no build to merge.
        """
        if not self._plan_path.is_file():
            raise ValueError(f"there is nothing to merge into {self.out}: {self._plan_path} does not exist")
        return dict(json.loads(self._plan_path.read_bytes()))

    # ------------------------------------------------------------------ merge

    def published(self, shard_bytes: int | None) -> bool:
        """Return whether the cache of the plan is in place and only the folder is left over."""
        note = self.path / "publishing"
        if not note.is_file() or not self.out.exists():
            return False
        plan, form, inode, _ = json.loads(note.read_text())
        same_plan = not self._plan_path.is_file() or plan == self._plan_digest()  # it is taken away before the note
        return bool(same_plan and form == shard_bytes and inode == self.out.stat().st_ino)

    def left_out(self) -> int:
        """Return how many scans the published cache lacks because they were refused or repeat others."""
        return int(json.loads((self.path / "publishing").read_text())[3])

    def _plan_digest(self) -> str:
        return hashlib.sha256(self._plan_path.read_bytes()).hexdigest()

    def merge(self, shard_bytes: int | None = None, partial: bool = False) -> int:
        """Make the cache from the parts, give it its name and remove the folder.

        Args:
            shard_bytes: stored bytes per file of a cache that is a folder of several, or None for one file.
            partial: leave out the jobs that are not done instead of refusing.

        Returns:
            Number of scans left out because they have the same bytes as others.

        Raises:
            ValueError: jobs are not done, no case is there, the cases cannot be split, or the disk is full.
        """
        repeated = 0
        try:
            if not self.published(shard_bytes):
                repeated = self._merge(shard_bytes, partial)
        except OSError as error:
            raise ValueError(f"cannot write {self.out}: {error.strerror or error}{self.how_to_go_on(error)}") from error
        self.remove()
        return repeated

    def how_to_go_on(self, error: OSError | None = None) -> str:
        """Return a sentence on what stands in the folder and how to go on."""
        room = "make room and " if error is not None and is_full(error) else ""
        old = self.path / "replaced"
        otherwise = f"; the cache that was there before is {old}" if old.exists() else ", or delete that folder"
        return (
            f"; {len(self.ready())} finished cases are kept in {self.path}: {room}run the same command again to go on"
            f"{otherwise}"
        )

    def _merge(self, shard_bytes: int | None, partial: bool) -> int:
        plan = self.read_plan()
        merged = self.path / "merged"
        layout, repeated = self._layout(plan, shard_bytes, partial)
        merged.mkdir(exist_ok=True)
        files = []
        for number, members in enumerate(layout):
            place = merged / f"shard-{number:05d}{SHARD_SUFFIX}"
            if not place.exists():
                self._check_room(members)
                self._write_file(place, members, plan)
            files.append(place)
            if shard_bytes is not None:  # so that a large cache needs room for itself and one shard more
                for digest, _ in members:
                    (self._part(digest)).unlink(missing_ok=True)
        if shard_bytes is None:
            self._publish(files[0], None, repeated)
            return repeated
        rows = sorted(
            ((info, number) for number, members in enumerate(layout) for _, info in members),
            key=lambda row: row[0].key,
        )
        index = {
            "format": FORMAT,
            "version": VERSION,
            "salt_fingerprint": plan["salt_fingerprint"],
            "class_names": plan["class_names"],
            "files": [{"name": place.name, "bytes": place.stat().st_size} for place in files],
            "cases": [{**info.to_json(), "file": number} for info, number in rows],
        }
        write_whole(merged / INDEX_NAME, json.dumps(index, separators=(",", ":"), allow_nan=False).encode())
        self._publish(merged, shard_bytes, repeated)
        return repeated

    def decided(self, shard_bytes: int | None) -> dict[str, CaseInfo]:
        """Return the cases by digest where a merge of this plan was interrupted; its parts may be used up."""
        note = self.path / "layout.json"
        if not note.is_file():
            return {}
        stored = json.loads(note.read_bytes())
        if stored["identity"] != [self._plan_digest(), shard_bytes, False]:
            return {}
        return {digest: CaseInfo.from_json(info) for file in stored["files"] for digest, info in file}

    def _layout(
        self, plan: dict[str, Any], shard_bytes: int | None, partial: bool
    ) -> tuple[list[list[tuple[str, CaseInfo]]], int]:
        """Return per file the (digest, case) of its members, and the number of repeated scans.

        An interrupted merge goes on as it had decided. One of another kind is begun anew, unless it has used up parts.

        Raises:
            ValueError: parts of this merge are in the files of another that was interrupted.
        """
        note = self.path / "layout.json"
        identity = [self._plan_digest(), shard_bytes, partial]
        stored = json.loads(note.read_bytes()) if note.is_file() else None
        if stored is not None and stored["identity"] == identity:
            files = [[(digest, CaseInfo.from_json(info)) for digest, info in file] for file in stored["files"]]
            return files, stored["repeated"]
        if stored is not None:
            wanted = set(plan["jobs"])
            used_up = [d for file in stored["files"] for d, _ in file if d in wanted and not self._part(d).is_file()]
            if used_up:
                _, size, left_out = stored["identity"]
                flags = (["--partial"] if left_out else []) + ([f"--shard-gib {size / 2**30:.17g}"] if size else [])
                raise ValueError(
                    f"an interrupted merge stands in {self.path}, and {len(used_up)} cases are in its files only: let "
                    f"it end with agssd merge {self.out} {' '.join(flags)}, or prepare those cases again with "
                    "agssd prepare"
                )
        members, repeated = self._members(plan, partial)
        infos = {info.key: info for info in resolve_splits([part.info for _, part in members])}
        names = {name: index for index, name in enumerate(plan["class_names"])}
        files = [[]]
        filled = 0
        for digest, part in sorted(members, key=lambda member: member[1].info.key):
            if shard_bytes is not None and filled and filled + part.stored_bytes > shard_bytes:
                files.append([])
                filled = 0
            filled += part.stored_bytes
            index = None if part.class_name is None else names[part.class_name]
            files[-1].append((digest, replace(infos[part.info.key], class_index=index)))
        note.unlink(missing_ok=True)
        shutil.rmtree(self.path / "merged", ignore_errors=True)
        text = [[(digest, info.to_json()) for digest, info in file] for file in files]
        write_whole(note, json.dumps({"identity": identity, "files": text, "repeated": repeated}).encode())
        return files, repeated

    def _part(self, digest: str) -> Path:
        return self.parts / f"{digest}.h5"

    def _members(self, plan: dict[str, Any], partial: bool) -> tuple[list[tuple[str, Part]], int]:
        """Return the parts that become cases, all of the plan's and of equal sources the first, and how many repeat."""
        members: list[tuple[str, Part]] = []
        sources: Counter[str] = Counter()
        missing = 0
        for digest in plan["jobs"]:
            path = self._part(digest)
            if path.is_file():
                part = read_part(path)
                sources[part.info.source_sha256] += 1
                if sources[part.info.source_sha256] == 1:
                    members.append((digest, part))
            elif not path.with_suffix(".refused").is_file():
                missing += 1
        if missing and not partial:
            raise ValueError(
                f"{missing} of {len(plan['jobs'])} scans are neither cached nor refused in {self.path}: run the shards "
                "that have not ended well again, or leave those scans out with agssd merge --partial"
            )
        if not members:
            raise ValueError(f"all {len(plan['jobs'])} scans were refused; no cache was written")
        return members, sources.total() - len(members)

    def _check_room(self, members: Sequence[tuple[str, CaseInfo]]) -> None:
        needed = sum((self._part(digest)).stat().st_size for digest, _ in members)
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise ValueError(
                f"merging into {self.out} needs {needed / 2**20:.1f} MiB and {self.path.parent} has "
                f"{free / 2**20:.1f} MiB free{self.how_to_go_on(OSError(28, ''))}"
            )

    def _write_file(self, place: Path, members: Sequence[tuple[str, CaseInfo]], plan: dict[str, Any]) -> None:
        import h5py

        with CacheWriter(place, plan["class_names"]) as writer:
            for digest, info in members:
                with h5py.File(self._part(digest), "r", locking=False) as part:
                    writer.copy(part["case"], info)
            writer.finish_shard([info for _, info in members], plan["salt_fingerprint"])

    def _publish(self, merged: Path, shard_bytes: int | None, repeated: int) -> None:
        """Give the finished file or folder its name; what was there before is moved away first."""
        left_out = repeated + self.refusals().total()
        note = [self._plan_digest(), shard_bytes, merged.stat().st_ino, left_out]
        write_whole(self.path / "publishing", json.dumps(note).encode())
        sync(self.path)
        if self.out.exists() and (self.out.is_dir() or merged.is_dir()):
            old = self.path / "replaced"
            shutil.rmtree(old, ignore_errors=True)
            os.replace(self.out, old)
        os.replace(merged, self.out)
        sync(self.out.parent)
