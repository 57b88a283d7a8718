"""Build a cache from files, folders and manifests of scans."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from agssd.data_modules.build import CacheWriter
    from agssd.data_modules.cache import CaseInfo
    from agssd.scans.case import PreparedCase
    from agssd.scans.prepare import Recipe
    from agssd.scans.sources import Job, Plan


_FORECAST_FROM = 30  # scans; below that the build is as quick as a forecast
_FORECAST_SAMPLE = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``agssd prepare``."""
    parser.add_argument(
        "source",
        nargs="+",
        type=Path,
        help="file, folder (searched recursively; DICOM series in it are found) or CSV manifest",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="CACHE", help="cache file to write, used as given")
    parser.add_argument("--modality", choices=("ct", "mri", "auto"), default="auto", help="default: decide per file")
    parser.add_argument(
        "--spacing-mm",
        type=_millimetres,
        nargs="+",
        metavar="S",
        help="voxel size, one number or three in the order superior, anterior, right; default 1.5 for CT, 1.0 for MRI",
    )
    parser.add_argument(
        "--labels",
        action="append",
        default=[],
        metavar="GLOB",
        help="files whose name (with a slash: relative path) matches are label maps; may be repeated",
    )
    parser.add_argument(
        "--subject",
        metavar="REGEX",
        help="searched in the relative path; its first group, or the match, is the subject",
    )
    parser.add_argument(
        "--volume",
        type=int,
        metavar="I",
        help="of 4D files and DICOM series of several volumes take volume I, from 0; otherwise they are refused",
    )
    parser.add_argument("--pet", action="store_true", help="take DICOM PET too, stored as MRI is (no SUV)")
    parser.add_argument(
        "--unshear",
        action="store_true",
        help="resample grids whose axes are not at right angles, as under gantry tilt; otherwise they are refused",
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes; the result does not depend on it"
    )
    parser.add_argument(
        "--layout",
        choices=("chunks", "contiguous"),
        default="chunks",
        help="compressed chunks (default), or voxels as they are: two to three times the bytes, read without decoding",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing cache")
    parser.add_argument(
        "--no-forecast",
        action="store_true",
        help=f"start at once; otherwise, from {_FORECAST_FROM} scans on, bytes and hours are forecast from a few, "
        "and a disk that cannot hold the cache ends the build before it begins",
    )
    parser.add_argument(
        "--salt",
        type=Path,
        metavar="FILE",
        help="salt of the subject keys, made where there is none; default .agssd-salt beside the source; caches to be "
        "joined in training need one salt for all",
    )
    parser.add_argument(
        "--key-map", type=Path, metavar="FILE", help="write a CSV of case key, subject and path; keep it private"
    )


def run(args: argparse.Namespace) -> int:
    """Build the cache; return 0 when all was cached, 3 when some was refused, 1 when no cache was written."""
    try:
        return _prepare(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; no cache was written", file=sys.stderr)
        return 1


def _prepare(args: argparse.Namespace) -> int:
    from agssd.data_modules.build import CacheWriter, check_place
    from agssd.scans.keys import salt_place
    from agssd.scans.prepare import Recipe
    from agssd.scans.sources import plan_sources

    out: Path = args.out
    recipe = Recipe(spacing_mm=_spacing(args.spacing_mm), unshear=args.unshear)
    if args.workers < 1:
        raise ValueError(f"--workers is {args.workers}; it must be at least 1")
    check_place(out, args.overwrite)
    modality = None if args.modality == "auto" else args.modality
    plan = plan_sources(args.source, args.labels, args.subject, modality, args.volume, args.pet)
    for note in plan.notes:
        print(f"note: {note}")
    for path, reason in plan.refused:
        print(f"refused: {path}: {reason}")
    if not plan.jobs:
        raise ValueError("no scan to prepare; no cache was written")
    salt_path = salt_place(args.source[0], out, args.salt)
    if len(plan.jobs) >= _FORECAST_FROM and not args.no_forecast:
        _forecast(plan.jobs, recipe, out, args.workers, args.layout)
    with CacheWriter(out, _class_names(plan), overwrite=args.overwrite, layout=args.layout) as writer:
        report = _write_cases(writer, plan, recipe, salt_path, args.workers)
        refused = len(plan.refused) + report.refused
        if not len(writer):
            raise ValueError(f"all {refused} scans were refused; no cache was written")
        infos = writer.finish(salt_fingerprint=report.salt_fingerprint)
    if args.key_map is not None:
        _write_key_map(args.key_map, report.rows)
    _print_summary(out, infos, report, refused, plan.ignored)
    return 3 if refused else 0


def _forecast(jobs: Sequence[Job], recipe: Recipe, out: Path, workers: int, layout: str) -> None:
    """Print bytes, time and reading rate as a few scans, spread over the plan and prepared for it, let expect them.

    Raises:
        ValueError: if the disk has less room than that.
    """
    import shutil
    import tempfile
    import time

    from agssd.data_modules.build import CacheWriter

    chosen = [jobs[i * (len(jobs) - 1) // (_FORECAST_SAMPLE - 1)] for i in range(_FORECAST_SAMPLE)]
    seconds, read = 0.0, 0
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        with CacheWriter(Path(folder) / "sample.h5", layout=layout) as writer:
            for number, job in enumerate(chosen):
                started = time.perf_counter()
                case = _work(job, recipe)
                if not isinstance(case, str):
                    writer.add(case, str(number), str(number))
                if number:  # the first one pays for imports
                    seconds += time.perf_counter() - started
                    read += sum(path.stat().st_size for path in job.files())
            cached, size = len(writer), writer.size_bytes
    if not cached:
        return  # the build will say why
    total = size / cached * len(jobs)
    free = shutil.disk_usage(out.parent).free
    time_needed = _hours(seconds / (_FORECAST_SAMPLE - 1) * len(jobs) / workers)
    rate = read / 2**20 / seconds * workers
    print(
        f"forecast from {cached} of {len(jobs)} scans: {_bytes(total)}, {time_needed}, reading {rate:.1f} MiB/s; "
        f"{_bytes(free)} free"
    )
    if total > free:
        raise ValueError(
            f"the cache would take about {_bytes(total)} and {out.parent} has {_bytes(free)} free; choose another "
            "--out, a larger --spacing-mm, or --no-forecast to try all the same"
        )


def _bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _hours(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 90
        else f"{minutes} min"
    )


class _Report(NamedTuple):
    refused: int
    rows: list[tuple[str, str, str]]  # case key, subject, path
    guesses: dict[str, list[Path]]  # what was decided and why -> files
    salt_fingerprint: str | None  # None where all was refused


def _write_cases(writer: CacheWriter, plan: Plan, recipe: Recipe, salt_path: Path, workers: int) -> _Report:
    from tqdm import tqdm

    from agssd.scans.keys import case_key, open_salt, salt_fingerprint, subject_key

    salt: bytes | None = None
    if salt_path.is_file():  # so that one that is no use stops the build before work
        salt = open_salt(salt_path)[0]
        print(_about_salt(salt_path, created=False))
    refused = 0
    rows: list[tuple[str, str, str]] = []
    guesses: dict[str, list[Path]] = defaultdict(list)
    known: dict[str, Path] = {}
    quiet = 0.1 if sys.stderr.isatty() else 10.0  # a log file gets a line every ten seconds
    bar = tqdm(total=len(plan.jobs), unit="scan", file=sys.stderr, dynamic_ncols=True, mininterval=quiet)
    for job, result in _results(plan.jobs, recipe, workers):
        bar.update()
        if isinstance(result, str):
            bar.write(f"refused: {job.paths[0]}: {result}", file=sys.stdout)
            refused += 1
            continue
        case = result
        twin = known.setdefault(case.source_sha256, job.paths[0])
        if twin != job.paths[0]:
            bar.write(f"refused: {job.paths[0]}: same bytes as {twin}", file=sys.stdout)
            refused += 1
            continue
        if salt is None:  # made for the first case that is accepted: where all is refused nothing is left behind
            salt, created = open_salt(salt_path)
            bar.write(_about_salt(salt_path, created), file=sys.stdout)
        key = case_key(salt, job.subject, case.source_sha256)
        for note in case.notes:
            bar.write(f"note: {job.paths[0]}: {note}", file=sys.stdout)
        if case.modality_reason:
            guesses[f"{case.modality}, because {case.modality_reason}"].append(job.paths[0])
        writer.add(case, key, subject_key(salt, job.subject), job.split, job.class_name)
        rows.append((key, job.subject, ";".join(str(path) for path in job.paths)))
    bar.close()
    return _Report(refused, rows, guesses, None if salt is None else salt_fingerprint(salt))


def _about_salt(path: Path, created: bool) -> str:
    return f"salt: {path} ({'created' if created else 'as found'}; keep it, and keep it private)"


def _results(jobs: Sequence[Job], recipe: Recipe, workers: int) -> Iterator[tuple[Job, PreparedCase | str]]:
    """Yield every job with its case, or with the reason why it was refused, in the order of the jobs."""
    if workers == 1:
        for job in jobs:
            yield job, _work(job, recipe)
        return
    from collections import deque
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_limit_threads) as pool:
        waiting: deque[tuple[Job, Future[Any]]] = deque()
        remaining = iter(jobs)
        try:
            for job in remaining:
                waiting.append((job, pool.submit(_work, job, recipe)))
                if len(waiting) >= 2 * workers:  # so that finished volumes do not pile up in memory
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        except BrokenProcessPool as error:
            raise ValueError("a worker died, most likely for want of memory; use fewer --workers") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _limit_threads() -> None:
    """Give each worker one thread: the processes are the parallelism."""
    import torch

    torch.set_num_threads(1)


def _work(job: Job, recipe: Recipe) -> PreparedCase | str:
    """Return the case, or the reason for refusing it."""
    from agssd.scans.case import RefusedError
    from agssd.scans.prepare import prepare_case

    try:
        return prepare_case(job.paths, job.label, job.modality, recipe, job.series, job.volume)
    except RefusedError as error:
        return str(error)
    except MemoryError:
        return "not enough memory"
    except Exception as error:  # a file no library foresaw must not cost the hours spent on the others
        message = " ".join(str(error).split())
        return f"unexpected {type(error).__name__}: {message}"


def _millimetres(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; name SOURCE before --spacing-mm") from None


def _spacing(values: list[float] | None) -> tuple[float, float, float] | None:
    if values is None:
        return None
    if len(values) not in (1, 3) or min(values) <= 0:
        raise ValueError(f"--spacing-mm is {' '.join(map(str, values))}; give one positive number or three")
    return (values[0], values[0], values[0]) if len(values) == 1 else (values[0], values[1], values[2])


def _class_names(plan: Plan) -> list[str]:
    """Return the classes of the plan, by number where all are numbers, else by name."""
    names = {job.class_name for job in plan.jobs if job.class_name is not None}
    return sorted(names, key=lambda name: (int(name), name)) if all(n.isdigit() for n in names) else sorted(names)


def _write_key_map(path: Path, rows: list[tuple[str, str, str]]) -> None:
    import csv

    try:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("key", "subject", "path"), *sorted(rows)])
    except OSError as error:
        raise ValueError(f"the cache is written, but not the key map {path}: {error.strerror}") from error


def _print_summary(out: Path, infos: Sequence[CaseInfo], report: _Report, refused: int, ignored: int) -> None:
    from agssd.scans.prepare import same_spacing

    for reason, paths in sorted(report.guesses.items()):
        names = ", ".join(path.name for path in paths[:5]) + (", ..." if len(paths) > 5 else "")
        print(f"modality: {len(paths)} scans are {reason}: {names}")
    parts = []
    for split in ("train", "val", "test"):
        cases = [info for info in infos if info.split == split]
        parts.append(f"{len(cases)} {split} ({len({info.subject for info in cases})} subjects)")
    voxels = sum(info.shape[0] * info.shape[1] * info.shape[2] * info.channels for info in infos)
    labelled = sum(info.label_values is not None for info in infos)
    size = out.stat().st_size
    spacings = {info.modality: info.spacing_mm for info in reversed(infos)}  # of the first case of each
    if len(spacings) > 1 and not same_spacing(*spacings.values()):
        kinds = " and ".join(f"{kind} at {_numbers(spacings[kind])} mm" for kind in sorted(spacings))
        print(
            f"note: {out} holds {kinds}, and one training takes one spacing: run agssd prepare once per --modality, or "
            "give one --spacing-mm"
        )
    print(f"{out}: {len(infos)} cases, {', '.join(parts)}; {labelled} with labels")
    print(f"{size / 2**20:.1f} MiB, {voxels / 1e6:.1f} million voxels; {refused} refused, {ignored} files ignored")


def _numbers(values: Sequence[float]) -> str:
    return "x".join(f"{value:.3g}" for value in values)
