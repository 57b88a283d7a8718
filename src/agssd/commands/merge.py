"""Make the cache of a build whose shards have ended."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``agssd merge``."""
    from agssd.commands.prepare import positive

    parser.add_argument("cache", type=Path, help="the cache that agssd prepare --shard named with --out")
    parser.add_argument(
        "--shard-gib",
        type=positive,
        metavar="G",
        help="write a folder of files of about G GiB with one index instead of one file; for large sets",
    )
    parser.add_argument(
        "--partial", action="store_true", help="leave out scans that are not done, for want of time or disk"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing cache")


def run(args: argparse.Namespace) -> int:
    """Merge; return 0, 3 when the shards refused some scans, or 1 with the reason on stderr."""
    from agssd.commands.prepare import print_summary
    from agssd.data_modules.build import check_place
    from agssd.data_modules.build_folder import BuildFolder, build_path

    shard_bytes = None if args.shard_gib is None else int(args.shard_gib * 2**30)
    try:
        if not build_path(args.cache).is_dir():
            raise ValueError(
                f"there is nothing to merge: {build_path(args.cache)} does not exist; run agssd prepare --shard I/N "
                f"--out {args.cache} first"
            )
        with BuildFolder(args.cache) as folder:
            if not folder.published(shard_bytes):
                check_place(args.cache, args.overwrite)
            refused = folder.refusals()
            repeated = folder.merge(shard_bytes, args.partial)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for reason, count in refused.most_common():
        print(f"refused by the shards: {count}: {reason}")
    if repeated:
        print(f"refused: {repeated}: same bytes as another scan")
    print_summary(args.cache)
    return 3 if refused or repeated else 0
