"""Copy a cache with a region map beside every volume: supervoxels, label maps, or masks of SAM."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agssd.regions.source import RegionSource

SOURCES = ("supervoxels", "labels", "sam")
# options that a source takes, by the name of the argument; None is "not given"
_OPTIONS = {
    "supervoxels": ("size_mm", "compactness"),
    "labels": ("components",),
    "sam": ("sam", "checkpoint", "points", "min_iou", "min_stability", "components", "device"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``agssd regions``."""
    from agssd.commands.prepare import positive

    parser.add_argument("cache", type=Path, help="cache that agssd prepare has written")
    parser.add_argument("--source", choices=SOURCES, required=True, help="where regions come from")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="CACHE2", help="the copy with regions, used as given"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes of one thread each; the result does not depend on it, but for rounding in sam",
    )
    parser.add_argument(
        "--size-mm",
        type=positive,
        metavar="L",
        help="supervoxels: edge of a piece in mm, or in pixels where their size is not known (default: 16 mm, or about "
        "100 pieces where that is too large or not known)",
    )
    parser.add_argument(
        "--compactness", type=positive, metavar="C", help="supervoxels: higher is more cubic (default: 0.2)"
    )
    parser.add_argument(
        "--components",
        action="store_true",
        default=None,
        help="labels, sam --checkpoint: each connected piece is a region of its own",
    )
    parser.add_argument(
        "--sam", type=Path, metavar="DIR", help="sam: folder with config.json and model.safetensors of a SamModel"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE.ckpt", help="sam: a trained LP-SAM instead of a grid of points"
    )
    parser.add_argument(
        "--points", type=int, metavar="N", help="sam: points along the longer side of a frame (default: 32)"
    )
    parser.add_argument(
        "--min-iou", type=float, metavar="Q", help="sam: least quality that SAM foretells of a mask (default: 0.88)"
    )
    parser.add_argument(
        "--min-stability", type=float, metavar="S", help="sam: least stability of a mask's border (default: 0.95)"
    )
    parser.add_argument("--device", metavar="NAME", help="sam: where it runs, for example cuda (default: cpu)")
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE.png", help="also draw a frame or slice of some cases with its regions"
    )
    parser.add_argument("--cases", type=int, default=16, metavar="N", help="how many cases to draw (default: 16)")
    parser.add_argument("--shard-gib", type=positive, metavar="G", help="write a folder of files of about G GiB each")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing cache")


def run(args: argparse.Namespace) -> int:
    """Write the copy; return 0, or 1 with the reason on stderr."""
    from agssd.data_modules.build_folder import build_path

    try:
        _check(args)
        _write(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = build_path(args.out)
        remains = f"; what is done is kept in {kept}: the same command goes on from there" if kept.is_dir() else ""
        print(f"error: interrupted; no cache was written{remains}", file=sys.stderr)
        return 1
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse options of another source, and a sheet that could not be written after hours."""
    known = {name for names in _OPTIONS.values() for name in names}
    given = {name for name in known if getattr(args, name) is not None}
    wrong = sorted(given - set(_OPTIONS[args.source]))
    if wrong:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in wrong)
        raise ValueError(f"{names} cannot be given with --source {args.source}")
    if args.sheet is not None and (args.sheet.suffix.lower() != ".png" or not args.sheet.parent.is_dir()):
        raise ValueError(f"--sheet {args.sheet}: the name must end in .png, and its folder must exist")
    if args.cases < 1:
        raise ValueError(f"--cases is {args.cases}; give at least 1")


def source_of(args: argparse.Namespace) -> RegionSource:
    """Return the source that the arguments ask for.

    Raises:
        ValueError: for settings that cannot be, or a library that is not installed.
    """
    given = {name: getattr(args, name) for name in _OPTIONS[args.source] if getattr(args, name) is not None}
    if args.source == "supervoxels":
        from agssd.regions.supervoxels import Supervoxels

        return Supervoxels(**given)
    if args.source == "labels":
        from agssd.regions.labels import LabelRegions

        return LabelRegions(**given)
    from agssd.regions.sam import sam_source

    return sam_source(**given)


def _write(args: argparse.Namespace) -> None:
    from agssd.data_modules.cache import VolumeCache
    from agssd.data_modules.regions import num_ready, write_regions
    from agssd.regions.sheet import draw_sheet
    from agssd.scans.progress import progress

    source = source_of(args)
    count = len(VolumeCache(args.cache))
    shard_bytes = None if args.shard_gib is None else int(args.shard_gib * 2**30)
    ready = num_ready(args.out)
    if ready:
        print(f"note: {ready} cases of an interrupted call are there; those that fit are not done again")
    with progress(count, "case") as bar:
        for _ in write_regions(args.cache, args.out, source, args.workers, shard_bytes, args.overwrite):
            bar.update()
    cache = VolumeCache(args.out)
    numbers = [info.num_regions or 0 for info in cache.cases]
    print(f"written {args.out}: {len(cache)} cases with {min(numbers)} to {max(numbers)} regions each")
    empty = sum(number == 0 for number in numbers)
    if empty:
        print(f"warning: {empty} of {len(cache)} cases have no region at all; agssd inspect {args.out} lists them")
    if args.sheet is not None:
        draw_sheet(cache, args.sheet, args.cases)
        print(f"drawn {args.sheet}")
