"""Writing a cache: under a temporary name, whole cases one after another, renamed when finished."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agssd.data_modules.cache import CHECKSUM, CHUNK, FORMAT, SPLITS, VERSION, Affine, CaseInfo, is_folder_cache
from agssd.data_modules.chunk_reader import checksum, write_extents
from agssd.scans.case import PreparedCase
from agssd.scans.preparing.foreground import bounding_box
from agssd.whole_file import sync

LAYOUTS = ("chunks", "contiguous")
FILTERS = ("blosc-lz4", "bitshuffle-lz4", "blosc2-lz4", "lz4", "none")


def filter_arguments(name: str) -> dict[str, Any]:
    """Return the h5py arguments of a compression filter by its name in ``FILTERS``.

    The first is the default. Measured on three shared volumes as ``agssd prepare`` stores them (two MRI at 1 mm, one CT
    at 1.5 mm; 2-core x86-64 CPU, one thread, warm files, 2026-11-21): bytes of the image before over after, and the
    median of 60 random boxes of 96 voxels a side, best of 7 rounds, in ms for the image of each volume and in the mean
    for the foreground. Time for nothing to decode is in the last row.

    ==============  =====  =================  ==========
    filter          ratio  image ms           foreground
    ==============  =====  =================  ==========
    blosc-lz4        2.36  1.76, 1.21, 1.79         0.49
    bitshuffle-lz4   2.59  1.95, 1.64, 1.89         1.18
    blosc2-lz4       2.34  2.03, 1.59, 1.68         3.58
    lz4              1.86  1.27, 0.70, 3.29         0.47
    none             0.84  0.62, 0.58, 0.63         0.42
    ==============  =====  =================  ==========
    """
    import hdf5plugin

    if name == "blosc2-lz4":
        return dict(hdf5plugin.Blosc2(cname="lz4", clevel=5, filters=hdf5plugin.Blosc2.SHUFFLE))
    if name == "blosc-lz4":
        return dict(hdf5plugin.Blosc(cname="lz4", clevel=5, shuffle=hdf5plugin.Blosc.SHUFFLE))
    if name == "bitshuffle-lz4":
        return dict(hdf5plugin.Bitshuffle(cname="lz4"))
    if name == "lz4":
        return dict(hdf5plugin.LZ4())
    if name == "none":
        return {}
    raise ValueError(f"filter is {name!r}; use one of {', '.join(FILTERS)}")


def assign_splits(subjects: Sequence[str], held: Sequence[str] = ()) -> dict[str, str]:
    """Return a split for every subject, a function of the subject keys alone.

    Subjects are ordered by their key, which is a hash. About a tenth each goes to "val" and "test"; "val" needs at
    least 3 subjects and "test" at least 5, and "train" is never empty.

    Args:
        subjects: subject keys, repeats allowed.
        held: splits that have their subjects already and get no more, for example a "test" given by the source.
    """
    ordered = sorted(set(subjects))
    count = len(ordered)
    names: list[str] = []
    for name, least in (("val", 3), ("test", 5)):
        if name not in held and count >= least:
            names += [name] * max(1, round(0.1 * count))
    return {subject: names[row] if row < len(names) else "train" for row, subject in enumerate(ordered)}


class CacheWriter:
    """Write a cache; use as a context manager and call ``finish`` inside it.

    Nothing appears at ``path`` before ``finish``; leaving the block without it removes what was written.

    Args:
        path: where the cache is to be; its folder must exist.
        class_names: names of the classes, in the order of their indices.
        compression: a name in ``FILTERS``.
        overwrite: replace an existing file instead of refusing.
        layout: ``"chunks"``, compressed; or ``"contiguous"``, as the voxels are, which the reader maps into memory:
            two to three times the bytes for crops that cost no decoding.

    Raises:
        ValueError: ``path`` exists and ``overwrite`` is off, or its folder is missing or not writable.
    """

    def __init__(
        self,
        path: str | Path,
        class_names: Sequence[str] = (),
        compression: str = FILTERS[0],
        overwrite: bool = False,
        layout: str = LAYOUTS[0],
    ) -> None:
        """Check the place and open a temporary file beside it."""
        if layout not in LAYOUTS:
            raise ValueError(f"layout is {layout!r}; use one of {', '.join(LAYOUTS)}")
        self.path = Path(path)
        check_place(self.path, overwrite)
        self.class_names = tuple(class_names)
        self._filter = filter_arguments(compression)
        self._layout = layout
        self._temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(6)}.part")
        self._infos: list[CaseInfo] = []
        self._file: Any = None

    def __enter__(self) -> CacheWriter:
        """Open the temporary file."""
        import h5py

        try:
            self._file = h5py.File(self._temporary, "w", libver=("v110", "v110"), locking=False)
        except OSError as error:
            raise ValueError(f"cannot write {self.path}: {error}") from error
        self._file.attrs["format"] = FORMAT
        self._file.attrs["version"] = VERSION
        self._file.attrs["complete"] = False
        self._file.create_group("cases")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what is unfinished."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._temporary.unlink(missing_ok=True)

    def __len__(self) -> int:
        """Return the number of cases written so far."""
        return len(self._infos)

    @property
    def size_bytes(self) -> int:
        """Return the bytes written so far."""
        return self._temporary.stat().st_size

    def add(
        self, case: PreparedCase, key: str, subject: str, split: str | None = None, class_name: str | None = None
    ) -> CaseInfo:
        """Write one case and return what the index will say of it.

        Args:
            case: arrays and constants.
            key: name of the case, unique in the cache.
            subject: subject key.
            split: "train", "val" or "test", or None to let ``finish`` decide.
            class_name: one of ``class_names``, or None.

        Raises:
            ValueError: arrays that do not fit each other, a repeated key, an unknown split or class, or a full disk.
        """
        shape = case.foreground.shape
        if case.image.shape[1:] != shape or (case.label is not None and case.label.shape != shape):
            raise ValueError(f"case {key}: image, foreground and label differ in shape")
        if split is not None and split not in SPLITS:
            raise ValueError(f"case {key}: split is {split!r}; use one of {', '.join(SPLITS)}")
        if key in self._file["cases"]:
            raise ValueError(f"case {key} is in the cache already")
        try:
            write_arrays(self._file.create_group(f"cases/{key}"), case, self._layout, self._filter)
            self._file.flush()
        except OSError as error:
            raise ValueError(f"cannot write {self.path}: {error}") from error
        info = case_info(case, key, subject, split)
        if class_name is not None:
            info = replace(info, class_index=self.class_names.index(class_name))
        self._infos.append(info)
        return info

    def copy(self, group: Any, info: CaseInfo) -> None:
        """Take over the arrays of a case as another HDF5 file holds them, without decoding; ``info`` is of this cache.

        Raises:
            ValueError: a repeated key, or a full disk.
        """
        if info.key in self._file["cases"]:
            raise ValueError(f"case {info.key} is in the cache already")
        try:
            group.file.copy(group, self._file["cases"], name=info.key)
        except OSError as error:
            raise ValueError(f"cannot write {self.path}: {error}") from error
        self._infos.append(info)

    def finish(
        self, splits: Mapping[str, str] | None = None, salt_fingerprint: str | None = None
    ) -> tuple[CaseInfo, ...]:
        """Write the index, force the bytes to disk and give the file its name.

        Args:
            splits: split of each subject whose cases were added without one; by default ``assign_splits``.
            salt_fingerprint: of the salt of the subject keys, or None where there is none.

        Returns:
            The cases of the cache, ordered by key.

        Raises:
            ValueError: no case was added, a subject is in two splits, "train" is empty, or the disk is full.
        """
        infos = resolve_splits(self._infos, splits)
        self.finish_shard(infos, salt_fingerprint)
        return infos

    def finish_shard(self, infos: Sequence[CaseInfo], salt_fingerprint: str | None = None) -> None:
        """Do as ``finish``, with cases whose splits are decided, perhaps over several files.

        Raises:
            ValueError: the disk is full.
        """
        index = {"version": VERSION, "class_names": self.class_names, "cases": [info.to_json() for info in infos]}
        text = json.dumps(index, separators=(",", ":"), allow_nan=False).encode()
        try:
            for group in self._file["cases"].values():
                for name in ("image", "foreground", "label", "regions"):
                    if name in group:
                        write_extents(group, name)
            self._file.create_dataset("index", data=np.frombuffer(text, dtype=np.uint8))
            if salt_fingerprint is not None:
                self._file.attrs["salt_fingerprint"] = salt_fingerprint
            self._file.attrs["complete"] = True
            self._file.close()
            self._file = None
            sync(self._temporary)
            os.replace(self._temporary, self.path)
            sync(self.path.parent)
        except OSError as error:
            raise ValueError(f"cannot write {self.path}: {error}") from error


def write_arrays(group: Any, case: PreparedCase, layout: str, compression: Mapping[str, Any]) -> None:
    """Write the arrays of a case into an HDF5 group.

    Args:
        group: open and empty.
        case: arrays.
        layout: one of ``LAYOUTS``.
        compression: what ``filter_arguments`` returned; for ``"chunks"``.
    """
    chunk = chunk_shape(case.foreground.shape, case.spatial_dims)
    arrays: dict[str, tuple[NDArray[Any], tuple[int, ...]]] = {
        "image": (case.image, (1, *chunk)),
        "foreground": (case.foreground, chunk),
    }
    if case.label is not None:
        arrays["label"] = (case.label, chunk)
    for name, (array, chunks) in arrays.items():
        write_array(group, name, array, chunks if layout == "chunks" else None, compression)
    group.create_dataset("foreground_chunks", data=chunk_fractions(case.foreground))


def write_array(
    group: Any, name: str, array: NDArray[Any], chunks: tuple[int, ...] | None, compression: Mapping[str, Any]
) -> None:
    """Write one array: in compressed chunks, or, with ``chunks`` None, as its voxels are."""
    if chunks is not None:
        group.create_dataset(name, data=array, chunks=chunks, **compression)
        return
    data = group.create_dataset(name, data=array)
    data.attrs[CHECKSUM] = np.int64(checksum(np.ascontiguousarray(array)))  # chunks have theirs in the table of extents


def case_info(case: PreparedCase, key: str, subject: str, split: str | None) -> CaseInfo:
    """Return what the index will say of a case; its split may be decided later, and its class too."""
    shape = case.foreground.shape
    return CaseInfo(
        key=key,
        subject=subject,
        split=split or "",
        modality=case.modality,
        shape=(int(shape[0]), int(shape[1]), int(shape[2])),
        channels=int(case.image.shape[0]),
        spacing_mm=case.spacing_mm,
        affine=_nested(case.affine),
        source_shape=case.source_shape,
        source_affine=_nested(case.source_affine),
        source_sha256=case.source_sha256,
        scale=case.scale,
        offset=case.offset,
        low=case.low,
        high=case.high,
        fill=tuple(int(channel.min()) for channel in case.image),
        edge_q99=case.edge_q99,
        perceptual_hash=case.perceptual_hash,
        spatial_dims=case.spatial_dims,
        in_mm=case.in_mm,
        foreground_fraction=float(np.count_nonzero(case.foreground) / case.foreground.size),
        foreground_box=bounding_box(case.foreground),
        label_values=None if case.label is None else tuple(int(value) for value in np.unique(case.label)),
        label_sha256=None if case.label is None else hashlib.sha256(case.label.tobytes()).hexdigest(),
    )


def resolve_splits(infos: Sequence[CaseInfo], splits: Mapping[str, str] | None = None) -> tuple[CaseInfo, ...]:
    """Return the cases ordered by key, each with its split; checks that splits are by subject and train not empty."""
    if not infos:
        raise ValueError("no case could be cached")
    given: dict[str, str] = {}
    for info in infos:
        if info.split and given.setdefault(info.subject, info.split) != info.split:
            raise ValueError(f"subject {info.subject} is in two splits: {given[info.subject]} and {info.split}")
    free = [info.subject for info in infos if info.subject not in given]
    chosen = {**(assign_splits(free, tuple(given.values())) if splits is None else splits), **given}
    done = tuple(sorted((replace(info, split=chosen[info.subject]) for info in infos), key=lambda info: info.key))
    if not any(info.split == "train" for info in done):
        raise ValueError("every case is in split val or test; at least one subject must be in train")
    return done


def chunk_shape(shape: Sequence[int], spatial_dims: int = 3) -> tuple[int, ...]:
    """Return the chunk of an array: 32 voxels a side, and a whole axis of at most 48 voxels at once.

    Of frames it is 128 pixels a side of one frame, because one frame is read at a time.

    The latter reads the 194 shared hippocampus crops in 0.10 ms each, where eight chunks, mostly empty, took 0.29 ms
    and 14 % more disk (2-core x86-64 CPU, 2026-11-21).
    """
    if spatial_dims == 2:
        return (1, *(min(n, 4 * CHUNK) for n in shape[1:]))
    return tuple(n if n <= 3 * CHUNK // 2 else CHUNK for n in shape)


def chunk_fractions(foreground: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the share of foreground in each chunk of 32³ voxels (of what exists of it), (cD, cH, cW) float32."""
    counts = (foreground != 0).astype(np.float32)
    sizes = np.ones((), dtype=np.float32)
    for axis, length in enumerate(foreground.shape):
        starts = np.arange(0, length, CHUNK)
        counts = np.add.reduceat(counts, starts, axis=axis)
        sizes = np.multiply.outer(sizes, np.diff(np.append(starts, length)).astype(np.float32))
    return np.asarray(counts / sizes, dtype=np.float32)


def check_place(path: Path, overwrite: bool) -> None:
    """Raise ValueError unless a cache can be written at ``path``."""
    if path.is_dir() and not is_folder_cache(path):
        raise ValueError(f"{path} is a folder; --out names the cache itself, for example {path / 'scans.h5'}")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another name or pass --overwrite")
    if not path.parent.is_dir():
        raise ValueError(f"the folder {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"no permission to write into {path.parent}")


def _nested(affine: NDArray[np.float64]) -> Affine:
    return tuple((float(row[0]), float(row[1]), float(row[2]), float(row[3])) for row in affine)
