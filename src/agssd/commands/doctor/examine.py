"""One case at a time: what is wrong with a scan of a source, or with a case of a cache."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agssd.commands.doctor.picture import draw
from agssd.commands.doctor.preview import preview
from agssd.data_modules.build import case_info, chunk_fractions
from agssd.data_modules.cache import CaseInfo, Kind, VolumeCache
from agssd.data_modules.parts import Refusal, prepare_or_refuse
from agssd.scans.checks import check_geometry, check_intensities, check_prepared
from agssd.scans.findings import Finding, note, refusal
from agssd.scans.preparing.foreground import bounding_box
from agssd.scans.preparing.perceptual import perceptual_hash, perceptual_hash_of_frames
from agssd.scans.preparing.volumes import Recipe, canonical

if TYPE_CHECKING:
    from agssd.scans.read import Scan
    from agssd.scans.sources.jobs import Job


@dataclass
class Examined:
    """What one case told.

    Attributes:
        findings: of the case alone.
        info: what a cache says, or would say, of the case; None where it cannot be prepared or its index is unusable.
        picture: JPEG, or None where nothing can be drawn or no picture was asked for.
        class_name: of the case, or None.
    """

    findings: list[Finding] = field(default_factory=list)
    info: CaseInfo | None = None
    picture: bytes | None = None
    class_name: str | None = None


@dataclass(frozen=True)
class SourceExaminer:
    """Examines jobs of a source by preparing them as ``agssd prepare`` would.

    Each file is read once, and those refused for being no single volume once more for their picture.

    Attributes:
        recipe: how to prepare.
        pictures: whether to draw thumbnails.
    """

    recipe: Recipe
    pictures: bool

    def __call__(self, job: Job) -> Examined:
        """Return what is wrong with the scan of a job."""
        seen: list[Scan] = []
        case = prepare_or_refuse(job, self.recipe, seen)
        done = Examined(class_name=job.class_name)
        if isinstance(case, Refusal):
            done.findings.append(refusal(case.reason, [*job.paths, *([job.label] if job.label else [])]))
            if seen and done.findings[0].check != "label-map" and _spans_space(seen[0].affine):
                done.findings += check_geometry(seen[0].array.shape, seen[0].affine)
            if self.pictures:
                scan = seen[0] if seen else None
                if scan is None and done.findings[0].check in ("dimensions", "series"):
                    scan = preview(job.paths[0], job.series)
                done.picture = None if scan is None else _picture_of_scan(scan)
            return done
        done.findings += [note(text) for text in case.notes]
        body = float(np.count_nonzero(case.foreground) / case.foreground.size)
        if seen:  # frames have no place in the world, and their modality is stated
            done.findings += check_geometry(seen[0].array.shape, seen[0].affine)
        for scan in seen:
            stated = job.modality is not None or seen[0].modality is not None
            done.findings += check_intensities(scan, case.modality, stated, body)
        done.findings += check_prepared(case.foreground, case.label, case.edge_q99, case.modality)
        done.info = case_info(case, "", job.subject, job.split)
        if self.pictures:
            done.picture = _picture_of_case(done.info, case.image, case.foreground, case.label)
        return done


@dataclass(frozen=True)
class CacheExaminer:
    """Examines cases of a cache; every array is decoded whole.

    Attributes:
        path: of the cache.
        pictures: whether to draw thumbnails.
    """

    path: Path
    pictures: bool

    def __call__(self, row: int) -> Examined:
        """Return what is wrong with the case in a row of the index."""
        cache = _cache(self.path)
        info = cache.cases[row]
        name = None if info.class_index is None else cache.class_names[info.class_index]
        done = Examined(check_index(info), info, class_name=name)
        sane = not any(finding.check == "constants" for finding in done.findings)
        has: dict[Kind, bool] = {
            "image": True,
            "foreground": True,
            "label": info.label_values is not None,
            "regions": info.num_regions is not None,
        }
        arrays: dict[str, Any] = {}
        for kind in [kind for kind, there in has.items() if there]:
            try:
                arrays[kind] = cache.read_whole(row, kind)
            except ValueError as error:
                done.findings.append(Finding("decode", "error", f"The array {kind} cannot be decoded.", str(error)))
        try:
            arrays["foreground_chunks"] = cache.foreground_chunks(row)
        except ValueError as error:
            message = "The array foreground_chunks cannot be decoded."
            done.findings.append(Finding("decode", "error", message, str(error)))
        done.findings += check_arrays(info, arrays)
        image, foreground, label = (arrays.get(kind) for kind in ("image", "foreground", "label"))
        if foreground is not None:
            done.findings += check_prepared(foreground, label, info.edge_q99, info.modality)
            if info.perceptual_hash is None and sane and image is not None:  # caches of early versions have none
                values = image[0] * info.scale[0] + info.offset[0]
                of = perceptual_hash if info.spatial_dims == 3 else perceptual_hash_of_frames
                code = of(values, foreground, info.low[0], info.high[0])
                done.info = replace(info, perceptual_hash=code)
        if self.pictures and sane and image is not None:
            done.picture = _picture_of_case(info, image, foreground, label)
        return done


def check_index(info: CaseInfo) -> list[Finding]:
    """Check the constants of a case: finite, of the right sign, in agreement with each other."""
    wrong = []
    numbers = np.concatenate(
        [np.ravel(item) for item in (info.scale, info.offset, info.low, info.high, info.edge_q99, info.affine)]
    )
    if not np.isfinite(numbers).all():
        wrong.append("a constant is NaN or infinite")
    if min(info.scale) <= 0:
        wrong.append(f"scale is {min(info.scale):g}, not positive")
    if any(low >= high for low, high in zip(info.low, info.high, strict=True)):
        wrong.append("the low end of the intensity range is not below the high end")
    if min(info.edge_q99) < 0:
        wrong.append(f"edge_q99 is {min(info.edge_q99):g}, below 0")
    spacing = np.sqrt((np.asarray(info.affine)[:3, :3] ** 2).sum(axis=0))
    if not np.allclose(spacing, info.spacing_mm, rtol=1e-3):
        wrong.append("spacing and affine disagree")
    if info.channels != len(info.scale) or len(info.fill) != info.channels:
        wrong.append(f"{info.channels} channels, but constants of {len(info.scale)}")
    found = [Finding("constants", "error", f"{text[0].upper()}{text[1:]}.") for text in wrong]
    if info.spatial_dims == 2:  # pixels of unknown size, or of a few centimetres
        return found
    return [*found, *check_geometry(info.shape, np.asarray(info.affine))]


def check_arrays(info: CaseInfo, arrays: dict[str, Any]) -> list[Finding]:
    """Check whether arrays agree with the index.

    Args:
        info: of the case.
        arrays: "image", "foreground", "label", "regions", "foreground_chunks", as far as they could be read.
    """
    wrong = []
    shapes = {"image": (info.channels, *info.shape), **dict.fromkeys(("foreground", "label", "regions"), info.shape)}
    for kind, shape in shapes.items():
        if kind in arrays and arrays[kind].shape != shape:
            wrong.append(f"{kind} has shape {_times(arrays[kind].shape)}, the index says {_times(shape)}")
            del arrays[kind]
    if "image" in arrays and info.fill != (fill := tuple(int(channel.min()) for channel in arrays["image"])):
        wrong.append(f"the lowest values are {_list(fill)}, the index says {_list(info.fill)}")
    if "foreground" in arrays:
        body = arrays["foreground"]
        fraction = np.count_nonzero(body) / body.size
        if abs(fraction - info.foreground_fraction) > 1e-6:
            wrong.append(f"foreground fills {fraction:.4g}, the index says {info.foreground_fraction:.4g}")
        if bounding_box(body) != info.foreground_box:
            wrong.append("the foreground's box is not the index's")
        chunks = arrays.get("foreground_chunks")
        expected = chunk_fractions(body)
        if chunks is not None and (chunks.shape != expected.shape or not np.allclose(chunks, expected, atol=1e-5)):
            wrong.append("the shares of foreground per chunk are not the foreground's")
    if "label" in arrays and info.label_values is not None:
        values = tuple(int(value) for value in np.unique(arrays["label"]))
        if values != info.label_values:
            wrong.append(f"label values are {_list(values)}, the index says {_list(info.label_values)}")
    if "regions" in arrays:
        lowest, highest = int(arrays["regions"].min()), int(arrays["regions"].max())
        if lowest < 0 or highest != info.num_regions:
            wrong.append(f"regions are numbered {lowest} to {highest}, the index says up to {info.num_regions}")
    return [Finding("index", "error", f"{text[0].upper()}{text[1:]}.") for text in wrong]


@lru_cache(maxsize=1)
def _cache(path: Path) -> VolumeCache:
    return VolumeCache(path)


def _spans_space(affine: NDArray[np.float64]) -> bool:
    """Return whether the axes of a grid have lengths and are not in one plane."""
    lengths = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    if not np.isfinite(affine).all() or lengths.min() == 0:
        return False
    return bool(abs(np.linalg.det(affine[:3, :3] / lengths)) >= 1e-3)


def _picture_of_scan(scan: Scan) -> bytes:
    """Return the thumbnail of a scan as it was read; NaN is black, and a grid of no use is drawn as it is stored."""
    volume = canonical(scan if _spans_space(scan.affine) else replace(scan, affine=np.eye(4)))
    spacing = np.sqrt((volume.affine[:3, :3] ** 2).sum(axis=0))
    finite = volume.array[np.isfinite(volume.array)]
    low, high = (float(value) for value in np.percentile(finite, (0.5, 99.5))) if finite.size else (0.0, 1.0)
    return draw(volume.array.transpose(2, 1, 0), (spacing[2], spacing[1], spacing[0]), (low, high))


def _picture_of_case(info: CaseInfo, image: Any, foreground: Any, label: Any) -> bytes:
    window = tuple((value - info.offset[0]) / info.scale[0] for value in (info.low[0], info.high[0]))
    return draw(image[0], info.spacing_mm, (window[0], window[1]), foreground, label)


def _times(values: tuple[int, ...]) -> str:
    return "x".join(map(str, values))


def _list(values: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, values[:8]))
    return f"{shown}, ..." if len(values) > 8 else shown
