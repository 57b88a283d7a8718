"""The cache of volumes: one HDF5 file or a folder of them, read by crops, opened lazily in each process.

Layout of the file: ``/cases/<key>`` holds ``image`` (C, D, H, W) int16, ``foreground`` (D, H, W) uint8, optionally
``label`` (D, H, W) uint8 or int16 and ``regions`` (D, H, W) uint8, int16 or int32, all in compressed chunks of 32
voxels a side, and ``foreground_chunks``
(cD, cH, cW) float32, the share of foreground in each chunk. Of frames the first axis counts
them, and a chunk is part of one frame. ``image_extents`` and the like say where the chunks lie in the file
(``agssd.data_modules.chunk_reader``); a file without them is read through HDF5. ``/index`` is one JSON text with every
``CaseInfo``, so that opening costs one read however many cases there are. The attribute
``salt_fingerprint`` tells which salt made the keys; caches of early versions have none. ``agssd.data_modules.build``
writes it.

A large set is a folder: ``index.json`` with every ``CaseInfo``, the names and sizes of the files, and which of them
holds a case. Each of the files is a cache of its own.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from agssd.data_modules.chunk_reader import BloscChunks, checksum, open_chunks
from agssd.types import Triple

FORMAT = "agssd-cache"
VERSION = 1
CHUNK = 32
INDEX_NAME = "index.json"
Kind = Literal["image", "foreground", "label", "regions"]
Affine = tuple[tuple[float, float, float, float], ...]
SPLITS = ("train", "val", "test")
_MAX_OPEN_FILES = 128  # each takes two file descriptors
_MAX_OPEN_DATASETS = 128  # that HDF5 reads, with a buffer each
_MAX_READERS = 8192  # of arrays that are read without HDF5: the table of a volume's chunks is a few KB
CHECKSUM = "xxh3"  # attribute of an array that is not compressed


@dataclass(frozen=True)
class CaseInfo:
    """What the cache knows of one volume besides its voxels. Triples follow tensor order (D, H, W).

    Attributes:
        key: name of the case, a salted hash.
        subject: salted hash of the person; all volumes of a person share it.
        split: "train", "val" or "test", the same for all volumes of a subject.
        modality: "ct" or "mri".
        shape: stored shape in voxels.
        channels: number of channels of ``image``.
        spacing_mm: stored spacing.
        affine: 4x4, stored voxel (d, h, w, 1) to world (x, y, z, 1) in mm, RAS+.
        source_shape: shape of the source array in the order of its file (i, j, k).
        source_affine: 4x4, source voxel (i, j, k, 1) to the same world.
        source_sha256: of the bytes of the source file.
        scale: per channel; ``stored * scale + offset`` is HU for CT, the source's units for MRI.
        offset: per channel.
        low: per channel, intensity at the low end of the model's range (CT: -1000 HU).
        high: per channel, intensity at the high end (CT: 1000 HU).
        fill: per channel, lowest stored value; what lies outside the volume reads as this.
        edge_q99: per channel, 99th percentile of the edge magnitude in the foreground; 0 for a flat volume.
        foreground_fraction: share of stored voxels that are foreground.
        foreground_box: smallest box around the foreground, [start, end) per axis.
        label_values: sorted values in the label map, or None without one.
        class_index: row in ``VolumeCache.class_names``, or None without a class.
        perceptual_hash: of the first channel, see ``agssd.scans.preparing.perceptual``; None where it would tell
            nothing, and in caches of early versions.
        spatial_dims: 3 for a volume. 2 for a picture or a sequence of frames: D then counts frames, which all are in
            one split, the first spacing says nothing, and H runs downwards in the picture, W to its right.
        in_mm: whether ``spacing_mm`` is in mm; False where the source does not say how large its pixels are, and
            lengths are in pixels.
        num_regions: highest number in the region map, or None without one; see ``agssd.data_modules.regions``.
        regions_sha256: of the region map, which tells a run from one on other regions; None without one, and in caches
            of early versions.
        label_sha256: of the label map as it is stored, which tells a bench from one on corrected labels; None without
            one, and in caches of early versions.
    """

    key: str
    subject: str
    split: str
    modality: str
    shape: Triple
    channels: int
    spacing_mm: tuple[float, float, float]
    affine: Affine
    source_shape: Triple
    source_affine: Affine
    source_sha256: str
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    fill: tuple[int, ...]
    edge_q99: tuple[float, ...]
    foreground_fraction: float
    foreground_box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    label_values: tuple[int, ...] | None = None
    class_index: int | None = None
    perceptual_hash: str | None = None
    spatial_dims: int = 3
    in_mm: bool = True
    num_regions: int | None = None
    regions_sha256: str | None = None
    label_sha256: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain lists, numbers and strings."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CaseInfo:
        """Return the case of ``to_json``; fields of later versions are ignored."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: _tuples(value) for name, value in data.items() if name in names})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


class VolumeCache:
    """Volumes of one cache, read crop by crop.

    No handle is open after construction: a file opens on the first read of each process and opens again after a
    fork, so one object may be handed to any number of loader workers, by fork or by pickle.

    Attributes:
        path: of the file or folder.
        files: the HDF5 files, one or several.
        class_names: names of the classes, in the order of their indices.
        cases: ordered by key.
        salt_fingerprint: equal in caches whose subject keys can be compared; None where it is not known.

    Raises:
        ValueError: the file is missing, truncated, unfinished, of another format or of a later version.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the index of the cache at ``path``."""
        self.path = Path(path)
        read = _read_folder_index if self.path.is_dir() else _read_index
        index, self.salt_fingerprint, self.files = read(self.path)
        self.class_names: tuple[str, ...] = tuple(index["class_names"])
        self.cases: tuple[CaseInfo, ...] = tuple(CaseInfo.from_json(case) for case in index["cases"])
        self._file_of: tuple[int, ...] = tuple(int(case.get("file", 0)) for case in index["cases"])
        self._reset()

    def _reset(self) -> None:
        self._handles: OrderedDict[int, _File] = OrderedDict()
        self._readers: OrderedDict[tuple[int, str], _Reader] = OrderedDict()
        self._pid = -1

    def __len__(self) -> int:
        """Return the number of cases."""
        return len(self.cases)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the handles behind when pickled."""
        names = ("path", "files", "class_names", "cases", "salt_fingerprint", "_file_of")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore without handles; the file opens on the first read."""
        self.__dict__.update(state)
        self._reset()

    def select(
        self,
        split: str | None = None,
        modality: str | None = None,
        labelled: bool | None = None,
        with_class: bool | None = None,
    ) -> list[int]:
        """Return the indices of the cases that fulfil every condition given (None: no condition)."""
        if split is not None and split not in SPLITS:
            raise ValueError(f"split is {split!r}; use one of {', '.join(SPLITS)}")
        return [
            index
            for index, case in enumerate(self.cases)
            if split in (None, case.split)
            and modality in (None, case.modality)
            and labelled in (None, case.label_values is not None)
            and with_class in (None, case.class_index is not None)
        ]

    def read(self, case: int, start: Triple, size: Triple, what: Kind = "image") -> NDArray[Any]:
        """Return the box [start, start + size) of a case, touching only the chunks it meets.

        Args:
            case: row in ``cases``.
            start: first voxel (d, h, w); may be negative or beyond the volume.
            size: (d, h, w) voxels, each at least 1.
            what: "image", "foreground", "label" or "regions".

        Returns:
            (C, d, h, w) int16 for the image, (d, h, w) uint8 for the foreground, (d, h, w) uint8 or int16 for the
            label, (d, h, w) uint8, int16 or int32 for the regions. Outside the volume the image holds its lowest
            stored value per channel, the others 0.

        Raises:
            ValueError: no such case, no such array, a size below 1, or the file can no longer be read.
        """
        data = self._dataset(case, what)
        info = self.cases[case]
        if min(size) < 1:
            raise ValueError(f"size is {tuple(size)}; every axis needs at least one voxel")
        low = tuple(max(s, 0) for s in start)
        high = tuple(min(s + n, whole) for s, n, whole in zip(start, size, info.shape, strict=True))
        lead = (slice(None),) if what == "image" else ()
        if all(h - lo == n for lo, h, n in zip(low, high, size, strict=True)):
            return self._slice(data, case, what, (*lead, *(slice(lo, h) for lo, h in zip(low, high, strict=True))))
        lead_shape = (info.channels,) if what == "image" else ()
        out = np.zeros((*lead_shape, *size), dtype=data.array.dtype)
        if what == "image":
            out[:] = np.asarray(info.fill, dtype=data.array.dtype)[:, None, None, None]
        if all(h > lo for lo, h in zip(low, high, strict=True)):
            inner = tuple(slice(lo - s, h - s) for lo, h, s in zip(low, high, start, strict=True))
            part = self._slice(data, case, what, (*lead, *(slice(lo, h) for lo, h in zip(low, high, strict=True))))
            out[(*lead, *inner)] = part
        return out

    def stored_bytes(self, case: int, start: Triple, size: Triple, what: Kind = "image") -> int:
        """Return the bytes of the file that reading the box [start, start + size) touches; arguments as in ``read``."""
        data: Any = self._dataset(case, what).array
        lead = (slice(0, self.cases[case].channels),) if what == "image" else ()
        axes = zip(start, size, self.cases[case].shape, strict=True)
        box = (*lead, *(slice(max(s, 0), max(min(s + n, whole), max(s, 0))) for s, n, whole in axes))
        if isinstance(data, BloscChunks):
            return data.stored_bytes(box)
        share: float = math.prod(part.stop - part.start for part in box) / math.prod(data.shape)
        stored: int = data.nbytes if isinstance(data, np.ndarray) else data.id.get_storage_size()
        return round(share * stored)

    def read_whole(self, case: int, what: Kind = "image") -> NDArray[Any]:
        """Return the whole array of a case; shapes and types as in ``read``."""
        data = self._dataset(case, what)
        whole = self._slice(data, case, what, (Ellipsis,))
        if data.checksum is not None and checksum(np.ascontiguousarray(whole)) != data.checksum:
            raise self._damaged(case, what, "its bytes have changed")
        return whole

    def file_of(self, case: int) -> Path:
        """Return the HDF5 file that holds a case."""
        return self.files[self._file_of[case]]

    def foreground_chunks(self, case: int) -> NDArray[np.float32]:
        """Return the share of foreground per chunk of 32³ voxels, (cD, cH, cW) float32, without decoding voxels."""
        data = self._dataset(case, "foreground_chunks")
        return cast("NDArray[np.float32]", self._slice(data, case, "foreground_chunks", (Ellipsis,)))

    def close(self) -> None:
        """Close what this process has open; the next read opens it again."""
        for file in self._handles.values():
            file.hdf5.close()
        self._reset()

    def size_bytes(self) -> int:
        """Return the bytes of its files."""
        return sum(path.stat().st_size for path in self.files)

    def _slice(self, data: _Reader, case: int, what: str, box: tuple[Any, ...]) -> NDArray[Any]:
        file = data.file
        try:
            if file.mapped.size() < len(file.view):  # to touch what is gone from a mapped file would end the process
                raise OSError(f"{self.files[data.number].name} has become shorter since it was opened")
            part = data.array[box]
            # a mapped file is copied from, so that nothing keeps it open or finds it read-only
            return np.array(part) if isinstance(data.array, np.ndarray) else cast("NDArray[Any]", part)
        except OSError as error:
            raise self._damaged(case, what, str(error)) from error

    def _damaged(self, case: int, what: str, reason: str) -> ValueError:
        key = self.cases[case].key
        return ValueError(f"{self.path}: cannot read {what} of case {key}: {reason}; rebuild the cache")

    def _dataset(self, case: int, what: str) -> _Reader:
        if self._pid != os.getpid():
            self.close()  # what was inherited over a fork: closes this process's copy only
            self._pid = os.getpid()
        reader = self._readers.get((case, what))
        if reader is not None:
            self._readers.move_to_end((case, what))
            return reader
        if not 0 <= case < len(self.cases):
            raise ValueError(f"case is {case}; {self.path} has cases 0 to {len(self.cases) - 1}")
        number = self._file_of[case]
        file = self._file(number)
        try:
            data = file.hdf5[f"cases/{self.cases[case].key}/{what}"]
        except KeyError as error:
            raise ValueError(f"{self.path}: case {self.cases[case].key} has no {what!r}") from error
        stored = data.attrs.get(CHECKSUM)
        array: Any = None
        if data.chunks is not None:
            array = open_chunks(data.parent, what, file.view)
        elif data.id.get_offset() is not None:  # voxels as they are, in one piece
            flat = np.frombuffer(file.view, data.dtype, data.size, data.id.get_offset())
            array = flat.reshape(data.shape)
        slow = array is None
        reader = _Reader(file, number, data if slow else array, slow, None if stored is None else int(stored))
        self._readers[case, what] = reader
        self._drop([key for key, known in self._readers.items() if known.slow][:-_MAX_OPEN_DATASETS] if slow else ())
        self._drop(list(self._readers)[:-_MAX_READERS] if len(self._readers) > _MAX_READERS else ())
        return reader

    def _drop(self, keys: Iterable[tuple[int, str]]) -> None:
        for key in keys:
            del self._readers[key]

    def _file(self, number: int) -> _File:
        file = self._handles.get(number)
        if file is not None:
            self._handles.move_to_end(number)
            return file
        import h5py
        import hdf5plugin  # noqa: F401  (registers the filters)

        path = self.files[number]
        try:
            handle = h5py.File(path, "r", locking=False, rdcc_nbytes=8 * CHUNK**3, rdcc_nslots=37, rdcc_w0=1.0)
            with path.open("rb") as plain:
                mapped = mmap.mmap(plain.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            many = "; raise the limit with ulimit -n" if error.errno == errno.EMFILE else ""
            raise ValueError(f"{path} cannot be opened as a cache: {error}{many}") from error
        file = self._handles[number] = _File(handle, mapped, memoryview(mapped))
        while len(self._handles) > _MAX_OPEN_FILES:
            old, closed = self._handles.popitem(last=False)
            self._drop([key for key, known in self._readers.items() if known.number == old])
            closed.hdf5.close()
        return file


class _File(NamedTuple):
    """One open file: by HDF5, and its bytes mapped into memory."""

    hdf5: Any
    mapped: mmap.mmap
    view: memoryview


class _Reader(NamedTuple):
    """One array: of a mapped file, of chunks in it, or (``slow``) as HDF5 reads it; all are sliced alike."""

    file: _File
    number: int
    array: Any
    slow: bool
    checksum: int | None


_Index = tuple[dict[str, Any], str | None, tuple[Path, ...]]


def _check_version(path: Path, version: int) -> None:
    if version != VERSION:
        raise ValueError(f"{path} is a cache of version {version}; this agssd reads version {VERSION}: rebuild it")


def is_folder_cache(path: Path) -> bool:
    """Return whether a folder is a cache and holds nothing else, so that it may be replaced."""
    try:
        index = json.loads((path / INDEX_NAME).read_bytes())
        names = {INDEX_NAME, *(file["name"] for file in index["files"])}
        return index["format"] == FORMAT and {entry.name for entry in path.iterdir()} <= names
    except (OSError, KeyError, TypeError, ValueError):
        return False


def _read_folder_index(path: Path) -> _Index:
    """Return the index of a folder, the fingerprint of its salt and its files, whose presence and size are checked."""
    place = path / INDEX_NAME
    if not place.is_file():
        raise ValueError(
            f"{path} is a folder and no agssd cache (it has no {INDEX_NAME}); build one with: agssd prepare"
        )
    try:
        index = json.loads(place.read_bytes())
        if index["format"] != FORMAT:
            raise KeyError("format")
        _check_version(path, int(index["version"]))
        files = [(path / file["name"], int(file["bytes"])) for file in index["files"]]
        fingerprint = index["salt_fingerprint"]
    except OSError as error:
        raise ValueError(f"{place} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is a damaged cache: its {INDEX_NAME} cannot be read ({error}); rebuild it") from error
    for file, size in files:
        if not file.is_file() or file.stat().st_size != size:
            state = f"has {file.stat().st_size} bytes" if file.is_file() else "is missing"
            raise ValueError(f"{path} is incomplete: {file.name} {state}, its index says {size} bytes; copy it again")
    return index, fingerprint, tuple(file for file, _ in files)


def _read_index(path: Path) -> _Index:
    """Return the index of a file, the fingerprint of its salt, and the file."""
    import h5py

    if not path.is_file():
        raise ValueError(f"cache {path} does not exist; build it with: agssd prepare SOURCE --out {path}")
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} is no agssd cache (not an HDF5 file); build one with: agssd prepare")
    try:
        with h5py.File(path, "r", locking=False) as file:
            if file.attrs.get("format") != FORMAT:
                raise ValueError(f"{path} is an HDF5 file but no agssd cache; build one with: agssd prepare")
            _check_version(path, int(file.attrs.get("version", 0)))
            if not bool(file.attrs.get("complete", False)):
                raise ValueError(f"{path} is an unfinished cache; build it again with: agssd prepare")
            fingerprint = file.attrs.get("salt_fingerprint")
            index = json.loads(bytes(file["index"][()]))
            return index, None if fingerprint is None else str(fingerprint), (path,)
    except OSError as error:
        raise ValueError(f"{path} is a truncated or damaged cache ({error}); rebuild it") from error
    except (KeyError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is a damaged cache: its index cannot be read ({error}); rebuild it") from error
