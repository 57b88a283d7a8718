"""Whole cases as parts: what the processes of a build leave for the merge, and what an interrupted build goes on from.

A part is a small HDF5 file with the arrays of one case, compressed as the cache will hold them, and a JSON text with
all that the index will say. It appears under its name only when all of it is on disk. Its name is a salted hash of the
job: of the files with their sizes and times of change, and of all settings that its bytes depend on. A part whose
source or settings have changed is therefore never found again, and no name can be read from a part's.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import io
import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agssd import __version__
from agssd.data_modules.build import case_info, filter_arguments, write_arrays
from agssd.data_modules.cache import VERSION, CaseInfo
from agssd.scans.case import PreparedCase, RefusedError
from agssd.scans.keys import case_key, subject_key
from agssd.scans.preparing.frames import prepare_frames
from agssd.scans.preparing.volumes import Recipe, prepare_case
from agssd.scans.read import Scan
from agssd.scans.sources.plan import Job


@dataclass(frozen=True)
class Part:
    """What a part says of its case.

    Attributes:
        info: the case; split "" where it is not decided, ``class_index`` always None.
        class_name: of the case, or None.
        modality_reason: why the modality was decided so, or None where it was given.
        notes: what the user should know of the scan.
        stored_bytes: of the arrays as stored.
    """

    info: CaseInfo
    class_name: str | None
    modality_reason: str | None
    notes: tuple[str, ...]
    stored_bytes: int

    def to_json(self) -> str:
        """Return the text that ``read_part`` reads."""
        return json.dumps({**vars(self), "info": self.info.to_json()})


@dataclass(frozen=True)
class Refusal:
    """Why a job gave no case.

    Attributes:
        reason: in words; in a file without the paths of the job.
        final: whether trying again must end the same way, as it does unless memory was short.
    """

    reason: str
    final: bool = True


@dataclass(frozen=True)
class Workshop:
    """What a process needs to make parts.

    Attributes:
        folder: where parts lie.
        salt: of the keys.
        recipe: how scans are prepared.
        layout: of the arrays, a name in ``LAYOUTS``.
        compression: a name in ``FILTERS``.
    """

    folder: Path
    salt: bytes
    recipe: Recipe
    layout: str
    compression: str

    def digest(self, job: Job) -> str:
        """Return the name of the part of a job, 32 hexadecimal digits."""
        identity = {
            "job": {key: str(value) for key, value in vars(job).items()},
            "files": [_stamp(path) for path in job.files()],
            "recipe": asdict(self.recipe),
            "layout": self.layout,
            "compression": self.compression,
            "version": [VERSION, __version__],
        }
        text = json.dumps(identity, sort_keys=True).encode()
        return hmac.new(self.salt, text, hashlib.sha256).hexdigest()[:32]

    def path(self, digest: str) -> Path:
        """Return where the part of a digest lies."""
        return self.folder / f"{digest}.h5"

    def refusal_path(self, digest: str) -> Path:
        """Return where it is noted that the job of a digest was refused."""
        return self.folder / f"{digest}.refused"

    def found(self, digest: str) -> Part | Refusal | None:
        """Return what an earlier build left of a job; None where it is to be done."""
        if self.path(digest).is_file():
            return read_part(self.path(digest))
        if self.refusal_path(digest).is_file():
            return Refusal(**json.loads(self.refusal_path(digest).read_text()))
        return None

    def make(self, job: Job, digest: str) -> Part | Refusal:
        """Prepare the case of a job and leave its part, or a note of its refusal.

        Raises:
            OSError: if the part cannot be written.
        """
        case = prepare_or_refuse(job, self.recipe)
        if isinstance(case, Refusal):
            reason = case.reason
            for path in sorted((str(path) for path in job.files()), key=len, reverse=True):
                reason = reason.replace(path, "FILE")
            note = json.dumps(asdict(Refusal(reason, case.final))).encode()
            write_whole(self.refusal_path(digest), note)
            return case
        subject = subject_key(self.salt, job.subject)
        info = case_info(case, case_key(self.salt, job.subject, case.source_sha256), subject, job.split)
        data, part = _image_of_part(case, info, job.class_name, self.layout, self.compression)
        write_whole(self.path(digest), data)
        return part


def prepare_or_refuse(job: Job, recipe: Recipe, seen: list[Scan] | None = None) -> PreparedCase | Refusal:
    """Return the case of a job, or why there is none; ``seen`` as in ``prepare_case``."""
    try:
        if job.modality == "us":
            return prepare_frames(job.paths, job.label, recipe)
        return prepare_case(job.paths, job.label, job.modality, recipe, job.series, job.volume, seen)
    except RefusedError as error:
        return Refusal(str(error))
    except MemoryError as error:
        return Refusal(f"not enough memory{f': {error}' if str(error) else ''}", final=False)
    except Exception as error:  # a file no library foresaw must not cost the hours spent on the others
        message = " ".join(str(error).split())
        return Refusal(f"unexpected {type(error).__name__}: {message}", final=False)


def part_bytes(job: Job, recipe: Recipe, layout: str, compression: str) -> int | None:
    """Return how many bytes the case of a job takes as stored, or None where it is refused; nothing is written."""
    case = prepare_or_refuse(job, recipe)
    if isinstance(case, Refusal):
        return None
    return _image_of_part(case, case_info(case, "0" * 16, "0" * 16, None), None, layout, compression)[1].stored_bytes


def read_part(path: Path) -> Part:
    """Return what a part says."""
    import h5py

    with h5py.File(path, "r", locking=False) as file:
        data = json.loads(file.attrs["part"])
    return Part(
        CaseInfo.from_json(data["info"]),
        data["class_name"],
        data["modality_reason"],
        tuple(data["notes"]),
        data["stored_bytes"],
    )


def _image_of_part(
    case: PreparedCase, info: CaseInfo, class_name: str | None, layout: str, compression: str
) -> tuple[bytes, Part]:
    """Return the bytes of a part's file, and what it says.

    Made in memory, so that a full disk is met by one plain write and not by HDF5, which can then not close its file.
    """
    import h5py

    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=("v110", "v110")) as file:
        group = file.create_group("case")
        write_arrays(group, case, layout, filter_arguments(compression))
        part = Part(info, class_name, case.modality_reason, case.notes, stored_bytes(group))
        file.attrs["part"] = part.to_json()
    return buffer.getvalue(), part


def stored_bytes(group: Any) -> int:
    """Return the bytes of a case's arrays as stored."""
    return sum(int(data.id.get_storage_size()) for data in group.values())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears under its name only when all of it is on disk.

    The name itself is not forced to disk: a part that a power failure takes away is made again.

    Raises:
        OSError: if it cannot be written; nothing is left then.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def is_full(error: OSError) -> bool:
    """Return whether an error is a full disk or an exhausted quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def _stamp(path: Path) -> list[Any]:
    try:
        stat = path.stat()
    except OSError:
        return [str(path.absolute())]
    return [str(path.absolute()), stat.st_size, stat.st_mtime_ns]
