"""Write a case of a cache as NIfTI, in the space of its source."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agssd.data_modules.cache import CaseInfo, Kind, VolumeCache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``agssd extract``."""
    parser.add_argument("cache", type=Path, help="cache file")
    parser.add_argument("case", help="key of the case, or its beginning, as agssd inspect lists it")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.nii.gz", help="file to write")
    parser.add_argument(
        "--what",
        choices=("image", "label", "foreground", "regions"),
        default="image",
        help="which array (default: image)",
    )
    parser.add_argument(
        "--cached-grid", action="store_true", help="keep the cache's voxels instead of returning to the source's"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def run(args: argparse.Namespace) -> int:
    """Write the file; return 0, or 1 with the reason on stderr."""
    try:
        print(extract(args.cache, args.case, args.out, args.what, args.cached_grid, args.overwrite))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def extract(
    cache_path: Path, key: str, out: Path, what: Kind = "image", cached_grid: bool = False, overwrite: bool = False
) -> str:
    """Write one array of a case as NIfTI and return a sentence about its error.

    Images are in HU (CT) or the source's units (MRI), float32, several channels as the fourth axis; they are the
    stored values, and so the source's within half a quantisation step where it lies inside the stored range and the
    cache kept its voxels. Other grids are interpolated linearly, labels, regions and foreground by nearest neighbour.

    Raises:
        ValueError: for a case or an array that is not there, and a place that cannot be written.
    """
    import numpy as np

    from agssd.data_modules.cache import VolumeCache
    from agssd.evaluation.predictions import resample_to_source, save_nifti

    if not out.name.endswith(".nii.gz"):
        raise ValueError(f"--out {out}: the name must end in .nii.gz")
    if out.exists() and not overwrite:
        raise ValueError(f"--out {out} exists; --overwrite replaces it")
    cache = VolumeCache(cache_path)
    case = _find(cache, key)
    info = cache.cases[case]
    if (what == "label" and info.label_values is None) or (what == "regions" and info.num_regions is None):
        raise ValueError(f"case {info.key} of {cache_path} has no {what}; --what image or foreground")
    stored = cache.read_whole(case, what)
    if what == "image":
        scale, offset = (np.asarray(v, np.float32)[:, None, None, None] for v in (info.scale, info.offset))
        volumes = list(stored.astype(np.float32) * scale + offset)
    else:
        volumes = [stored]
    if cached_grid:
        arrays, affine = volumes, info.affine
    else:
        order = 1 if what == "image" else 0
        outside = [float(volume.min()) if what == "image" else 0.0 for volume in volumes]
        arrays = [resample_to_source(v, info, order, low) for v, low in zip(volumes, outside, strict=True)]
        affine = info.source_affine
    save_nifti(arrays[0] if len(arrays) == 1 else np.stack(arrays, -1), affine, out)
    return f"written {out}: {what} of case {info.key}" + _error(info, what, cached_grid, _same_voxels(info))


def _error(info: CaseInfo, what: str, cached_grid: bool, same_voxels: bool) -> str:
    if what != "image":
        return ""
    step = max(info.scale) / 2
    where = "stored range" if info.spatial_dims == 3 else "stored range and the sector"
    grid = "" if cached_grid or same_voxels else ", and interpolated from the cache's spacing"
    return f"; stored values are within {step:.3g} of the source's inside the {where}{grid}"


def _same_voxels(info: CaseInfo) -> bool:
    """Return whether the cache kept the source's voxels, in whatever order."""
    import numpy as np

    to_cached = np.linalg.inv(np.asarray(info.affine)) @ np.asarray(info.source_affine)
    return bool(np.allclose(to_cached, np.round(to_cached), atol=1e-3))


def _find(cache: VolumeCache, key: str) -> int:
    found = [row for row, info in enumerate(cache.cases) if info.key.startswith(key)]
    exact = [row for row in found if cache.cases[row].key == key]
    if len(exact or found) != 1 or not key:
        kind = "no case" if not found else f"{len(found)} cases"
        raise ValueError(
            f"{cache.path} has {kind} whose key begins with {key!r}; agssd inspect {cache.path} lists them"
        )
    return (exact or found)[0]
