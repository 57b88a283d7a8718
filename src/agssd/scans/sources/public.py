"""Public sets by name: downloaded once, by the addresses and checksums of MONAI and torchio, into a folder per set.

A set is complete where its folder exists: it is downloaded, verified and unpacked under another name and renamed last.
Every set but those of the Decathlon, which have a ``dataset.json``, gets a ``manifest.csv``, so that the folder is an
ordinary source ever after, without network and without its name.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import fcntl
import logging
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_MSD = "CC BY-SA 4.0, http://medicaldecathlon.com"
_IXI = "CC BY-SA 3.0, https://brain-development.org/ixi-dataset"
_MEDMNIST = "https://medmnist.com"
_TIMEOUT = 60.0  # seconds without a byte


class _Grey(NamedTuple):
    """A set of MedMNIST in grey values."""

    licence: str
    md5: str  # of the file in record 5208230, which torchio downloads; as the package medmnist 2.0.2 states it
    spacing_mm: float
    about: str


_GREY_SETS = {
    "organ": _Grey(
        "CC BY 4.0",
        "21f0a239e7f502e6eca33c3fc453c0b6",
        1.0,
        "its boxes were resized, so voxel sizes in mm are unknown: 1 mm is written and means one voxel",
    ),
    "nodule": _Grey("CC BY 3.0", "902d495e3d91ad1a7bcac1a6b58a8fa2", 1.0, "its voxels are 1 mm, as its authors say"),
    "fracture": _Grey(
        "CC BY-NC 4.0",
        "6aa7b0143a6b42da40027a9dda61302f",
        64 / 28,
        "its voxels are 64 mm / 28, as its authors say; --spacing-mm 2.2857 keeps them",
    ),
}
_LICENCES = {
    **{
        f"msd:{task}": _MSD
        for task in (
            "Task01_BrainTumour",
            "Task02_Heart",
            "Task03_Liver",
            "Task04_Hippocampus",
            "Task05_Prostate",
            "Task06_Lung",
            "Task07_Pancreas",
            "Task08_HepaticVessel",
            "Task09_Spleen",
            "Task10_Colon",
        )
    },
    **{f"medmnist3d:{name}": f"{grey.licence}, {_MEDMNIST}" for name, grey in _GREY_SETS.items()},
    **{f"ixi:{contrast}": _IXI for contrast in ("T1", "T2", "PD", "MRA")},
    "ixi-tiny": _IXI,
}
SETS = tuple(_LICENCES)
_LEFT_OUT = {
    "medmnist3d:adrenal": "it holds binary shapes of glands, no scans",
    "medmnist3d:vessel": "it holds binary shapes of vessels, no scans",
    "medmnist3d:synapse": "it is electron microscopy, neither CT nor MRI",
    "ixi:DTI": "it holds single diffusion directions without their table",
}


def local_sources(
    sources: Sequence[Path], folder: Path, say: Callable[[str], None] = print
) -> tuple[list[Path], list[str]]:
    """Return the sources with names of public sets replaced by what ``plan_sources`` takes, and notes on them.

    Args:
        sources: files, folders, and names in ``SETS``; what exists as a file or folder is never taken for a name.
        folder: where sets are, or are downloaded to; made when needed.
        say: told before a download starts.

    Raises:
        ValueError: an unknown name (the message has the nearest and all known ones), a set that is left out, or a
            download that failed, of which nothing is kept.
    """
    found: list[Path] = []
    notes: list[str] = []
    for source in sources:
        name = str(source)
        if source.exists() or not _is_name(name):
            found.append(source)
            continue
        _check_name(name)
        place = fetch(name, folder, say)
        found.append(place / "manifest.csv" if (place / "manifest.csv").is_file() else place)
        family, _, part = name.partition(":")
        notes.append(f"{name}: licence {_LICENCES[name]}")
        if family == "medmnist3d":
            notes.append(
                f"{name}: {_GREY_SETS[part].about}. Orientation is unknown, values are 8-bit greys and no HU, so it is "
                "prepared like MRI; each volume counts as a subject of its own, and the splits are the set's"
            )
    return found, notes


def _is_name(text: str) -> bool:
    """Return whether a source that does not exist was meant as a name."""
    if "/" in text:
        return False
    return ":" in text or text in SETS or bool(difflib.get_close_matches(text.lower(), ("ixi-tiny",), cutoff=0.8))


def _check_name(name: str) -> None:
    if name in SETS:
        return
    if name in _LEFT_OUT:
        raise ValueError(f"{name} is not offered: {_LEFT_OUT[name]}")
    lower = {known.lower(): known for known in SETS}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    guess = f", did you mean {lower[near[0]]}?" if near else "."
    raise ValueError(f"{name} is neither a file nor a public set{guess} Known sets: {', '.join(SETS)}")


def fetch(name: str, folder: Path, say: Callable[[str], None] = print) -> Path:
    """Return the folder of a set in ``SETS``, downloaded unless it is there.

    Raises:
        ValueError: the download failed, was cut off or has another checksum, or the place cannot be written.
    """
    place = folder / name.replace(":", "-")
    if place.is_dir():
        return place
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / f".{place.name}.lock", say):
            if not place.is_dir():
                _make(name, place, say)
    except OSError as error:
        raise ValueError(f"cannot write {place}: {error.strerror or error}") from error
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()  # if nothing came
    return place


def _make(name: str, place: Path, say: Callable[[str], None]) -> None:
    partial = place.with_name(f".{place.name}.part")
    if partial.exists():
        shutil.rmtree(partial)  # what a killed download left
    partial.mkdir()
    family, _, part = name.partition(":")
    makers = {"msd": _decathlon, "medmnist3d": _medmnist, "ixi": _ixi, "ixi-tiny": _ixi_tiny}
    try:
        os.replace(makers[family](part, partial, say), place)
    except ValueError as error:
        raise ValueError(
            f"{error}; nothing was kept. The folder {place} from a machine that has it serves as well"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _alone(lock: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Let one process at a time download a set; a process that ends in whatever way lets go."""
    while True:
        file = lock.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process downloads into {lock.parent}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            say(f"{lock.parent} keeps no locks; make sure that no other process downloads into it")
        with contextlib.suppress(FileNotFoundError):  # where the process that had it has taken it away
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                break
        file.close()
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


def _download(url: str, md5: str, archive: Path, say: Callable[[str], None]) -> None:
    """Download a file of known checksum by MONAI, which downloads into the temporary folder first."""
    monai: Any = import_module("monai.apps.utils")
    say(f"downloading {url}")
    logger = logging.getLogger("monai.apps")
    before = logger.level, tempfile.tempdir, socket.getdefaulttimeout()
    reason = ""
    try:
        logger.setLevel(logging.CRITICAL + 1)
        tempfile.tempdir = str(archive.parent)  # the system's may be too small for tens of GB
        socket.setdefaulttimeout(_TIMEOUT)
        monai.download_url(url, archive, md5, "md5", progress=sys.stderr.isatty())
        reason = "" if archive.is_file() else "nothing arrived"
    except monai.HashCheckError:
        reason = "its checksum is not the published one"
    except (OSError, HTTPException) as error:  # among them URLError, HTTPError and a transfer that was cut off
        reason = str(getattr(error, "reason", None) or error)
    finally:
        logger.setLevel(before[0])
        tempfile.tempdir = before[1]
        socket.setdefaulttimeout(before[2])
    if reason:
        raise ValueError(f"{url} could not be downloaded ({' '.join(reason.split())})")


def _unpack(archive: Path, into: Path) -> None:
    monai: Any = import_module("monai.apps.utils")
    logger = logging.getLogger("monai.apps")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL + 1)
        monai.extractall(archive, into)
    finally:
        logger.setLevel(level)
    archive.unlink()


def _decathlon(task: str, partial: Path, say: Callable[[str], None]) -> Path:
    table: Any = import_module("monai.apps").DecathlonDataset
    archive = partial / f"{task}.tar"
    _download(table.resource[task], table.md5[task], archive, say)
    _unpack(archive, partial)
    if not (partial / task / "dataset.json").is_file():
        raise ValueError(f"{table.resource[task]} holds no {task}/dataset.json")
    return partial / task


def _medmnist(name: str, partial: Path, say: Callable[[str], None]) -> Path:
    """Write the volumes of a set of MedMNIST as NIfTI; a subject is a volume, since the set tells no more."""
    nib: Any = import_module("nibabel")
    base = import_module("torchio.datasets.medmnist").MedMNIST.BASE_URL
    archive = partial / f"{name}mnist3d.npz"
    grey = _GREY_SETS[name]
    _download(f"{base}/{archive.name}?download=1", grey.md5, archive, say)
    (partial / "set" / "images").mkdir(parents=True)
    affine = np.diag([*(grey.spacing_mm,) * 3, 1.0])
    rows = []
    with np.load(archive) as arrays:
        for split in ("train", "val", "test"):
            volumes, classes = arrays[f"{split}_images"], arrays[f"{split}_labels"]
            for number, (volume, kind) in enumerate(zip(volumes, classes.reshape(-1), strict=True)):
                path = Path("images") / f"{split}{number:05d}.nii"
                image = nib.Nifti1Image(volume, affine)
                image.header.set_xyzt_units("mm")
                nib.save(image, partial / "set" / path)
                rows.append((path, f"medmnist3d-{name}-{path.stem}", "mri", int(kind), split))
    archive.unlink()
    _write_manifest(partial / "set", ("path", "subject", "modality", "class", "split"), rows)
    return partial / "set"


def _ixi(contrast: str, partial: Path, say: Callable[[str], None]) -> Path:
    table: Any = import_module("torchio.datasets").IXI
    archive = partial / "set" / f"{contrast}.tar"
    archive.parent.mkdir()
    _download(table.base_url.format(modality=contrast), table.md5_dict[contrast], archive, say)
    _unpack(archive, partial / "set" / contrast)
    rows = [(f"{contrast}/{path.name}", _person(path), "mri") for path in _scans(partial / "set" / contrast)]
    _write_manifest(partial / "set", ("path", "subject", "modality"), rows)
    return partial / "set"


def _ixi_tiny(_: str, partial: Path, say: Callable[[str], None]) -> Path:
    table: Any = import_module("torchio.datasets").IXITiny
    archive = partial / "ixi_tiny.zip"
    _download(table.url, table.md5, archive, say)
    _unpack(archive, partial)
    place = partial / "ixi_tiny"
    images, labels = (_scans(place / kind) for kind in ("image", "label"))
    label_of = {_key(path): path for path in labels}
    missing = {_key(path) for path in images} ^ set(label_of)
    if missing:
        raise ValueError(f"{table.url}: {len(missing)} images or labels have no partner")
    rows = [(f"image/{path.name}", f"label/{label_of[_key(path)].name}", _person(path), "mri") for path in images]
    _write_manifest(place, ("path", "label_path", "subject", "modality"), rows)
    return place


def _scans(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.nii.gz") if not path.name.startswith("."))


def _key(path: Path) -> str:
    """Return IXI002-Guys-0828 of IXI002-Guys-0828_label.nii.gz."""
    return path.name.split("_")[0]


def _person(path: Path) -> str:
    """Return IXI002 of IXI002-Guys-0828-T1.nii.gz: the same in every set of IXI."""
    return path.name.split("-")[0]


def _write_manifest(folder: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
