"""What a build will need, as a few scans or the parts that are there let expect."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from agssd.data_modules.parts import Workshop
    from agssd.scans.sources.jobs import Job

FORECAST_FROM = 30  # scans; below that the build is as quick as a forecast
_SAMPLE = 4


class Sample(NamedTuple):
    """What some cases tell: bytes of each as stored; and where it was measured seconds per scan, bytes read per s."""

    sizes: list[int]
    seconds: float | None = None
    rate: float = 0.0


def sample_of_parts(paths: Sequence[Path]) -> Sample:
    """Return what finished parts tell."""
    return Sample([path.stat().st_size for path in paths])


def prepare_sample(jobs: Sequence[Job], workshop: Workshop) -> Sample:
    """Prepare a few scans, spread over the plan, without keeping them."""
    from agssd.data_modules.parts import part_bytes

    chosen = [jobs[i * (len(jobs) - 1) // (_SAMPLE - 1)] for i in range(_SAMPLE)]
    seconds, read = 0.0, 0
    sizes = []
    for number, job in enumerate(chosen):
        started = time.perf_counter()
        size = part_bytes(job, workshop.recipe, workshop.layout, workshop.compression)
        if size is not None:
            sizes.append(size)
        if number:  # the first one pays for imports
            seconds += time.perf_counter() - started
            read += sum(path.stat().st_size for path in job.files())
    return Sample(sizes, seconds / (_SAMPLE - 1), read / seconds)


def check_room(
    place: Path,
    sample: Sample,
    num_jobs: int,
    num_ready: int,
    num_mine: int,
    workers: int,
    shard_bytes: int | None,
    go_on: str,
) -> None:
    """Print what the build of all scans is expected to need.

    Args:
        place: folder of the cache.
        sample: what is known of some cases.
        num_jobs: all scans, those of other shards included.
        num_ready: how many of them stand in the build folder.
        num_mine: how many this process will prepare.
        workers: processes that share them.
        shard_bytes: of a cache of several files.
        go_on: said last, where something is ready: how to go on.

    Raises:
        ValueError: if the disk has less room: for the parts that are to come, and beside all parts for the cache, or of
            a cache of several files for one file at a time.
    """
    if not sample.sizes:
        return  # the build will say why
    total = sum(sample.sizes) / len(sample.sizes) * num_jobs
    needed = total * (1 - num_ready / num_jobs) + (total if shard_bytes is None else min(shard_bytes, total))
    free = shutil.disk_usage(place).free
    if sample.seconds is not None:
        print(
            f"forecast from {len(sample.sizes)} of {num_mine} scans: {bytes_text(total)}, "
            f"{_time_text(sample.seconds * num_mine / workers)}, reading {sample.rate * workers / 2**20:.1f} MiB/s; "
            f"{bytes_text(needed)} needed while building, {bytes_text(free)} free"
        )
    if needed > free:
        raise ValueError(
            f"building needs about {bytes_text(needed)} and {place} has {bytes_text(free)} free; choose another --out, "
            f"a larger --spacing-mm, --shard-gib (needs half), or --no-forecast to try all the same"
            f"{go_on if num_ready else ''}"
        )


def bytes_text(count: float) -> str:
    """Return MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _time_text(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 90 else f"{minutes} min"
