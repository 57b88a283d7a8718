"""Build a cache from files, folders and manifests of scans."""

from __future__ import annotations

import argparse
import errno
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agssd.commands._forecast import FORECAST_FROM, bytes_text, check_room, prepare_sample, sample_of_parts
from agssd.commands._which_scans import add_recipe_arguments, add_source_arguments, plan_of, recipe_of, tell

if TYPE_CHECKING:
    from agssd.data_modules.build_folder import BuildFolder, Shard
    from agssd.data_modules.cache import VolumeCache
    from agssd.data_modules.parts import Part, Refusal, Workshop
    from agssd.scans.sources.plan import Job, Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``agssd prepare``."""
    add_source_arguments(parser)
    add_recipe_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="CACHE", help="cache file to write, used as given")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes; the result does not depend on it"
    )
    parser.add_argument(
        "--layout",
        choices=("chunks", "contiguous"),
        default="chunks",
        help="compressed chunks (default), or voxels as they are: two to three times the bytes, read without decoding",
    )
    parser.add_argument(
        "--shard-gib",
        type=positive,
        metavar="G",
        help="write a folder of files of about G GiB with one index instead of one file; for large sets",
    )
    parser.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="do the I-th (from 0) of N parts of the work, for example --shard $SLURM_ARRAY_TASK_ID/16 in a job array, "
        "and leave the rest to `agssd merge CACHE`; the result does not depend on N",
    )
    parser.add_argument(
        "--quarantine",
        type=Path,
        metavar="FILE.csv",
        help="leave out the scans listed there, columns path and reason; agssd doctor writes such a list",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing cache")
    parser.add_argument(
        "--no-forecast",
        action="store_true",
        help=f"start at once; otherwise, from {FORECAST_FROM} scans on, bytes and hours are forecast from a few, "
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
        from agssd.data_modules.build_folder import build_path

        kept = build_path(args.out)
        remains = f"; what is done is kept in {kept}: the same command goes on from there" if kept.is_dir() else ""
        print(f"error: interrupted; no cache was written{remains}", file=sys.stderr)
        return 1


def _prepare(args: argparse.Namespace) -> int:
    from agssd.data_modules.build import FILTERS, check_place
    from agssd.data_modules.build_folder import BuildFolder, build_path
    from agssd.data_modules.parts import Workshop
    from agssd.scans.keys import open_salt, salt_fingerprint, salt_place
    from agssd.scans.sources.quarantine import apply_quarantine

    out: Path = args.out
    recipe = recipe_of(args)
    shard_bytes = None if args.shard_gib is None else int(args.shard_gib * 2**30)
    if args.workers < 1:
        raise ValueError(f"--workers is {args.workers}; it must be at least 1")
    # A cache beside its build folder may be of that build, killed before it could take the folder away.
    check_place(out, args.overwrite or build_path(out).is_dir())
    sources, plan = plan_of(args, out.parent / "downloads")
    if args.quarantine is not None:
        apply_quarantine(plan, args.quarantine)
    tell(plan)
    if not plan.jobs:
        raise ValueError("no scan to prepare; no cache was written")
    if all(job.split in ("val", "test") for job in plan.jobs):
        raise ValueError("every case is in split val or test; at least one subject must be in train")
    with BuildFolder(out, args.shard) as folder:
        salt_path = salt_place(sources[0], out, args.salt)
        salt, created = open_salt(salt_path)
        try:
            workshop = Workshop(folder.parts, salt, recipe, args.layout, FILTERS[0])
            digests = [workshop.digest(job) for job in plan.jobs]
            folder.write_plan(digests, _class_names(plan), salt_fingerprint(salt))
            if not folder.published(shard_bytes):
                check_place(out, args.overwrite)
            print(f"salt: {salt_path} ({'created' if created else 'as found'}; keep it, and keep it private)")
            if folder.published(shard_bytes) and not folder.decided(shard_bytes):
                left_out = len(plan.refused) + folder.left_out()
                folder.remove()
                print("note: an interrupted build had completed the cache; only its folder was left over")
                print_summary(out)
                return 3 if left_out else 0
            report = _build(folder, workshop, list(zip(plan.jobs, digests, strict=True)), shard_bytes, args)
            refused = len(plan.refused) + report.refused
            if args.shard is None:
                if not report.rows:
                    raise ValueError(f"all {refused} scans were refused; no cache was written")
                folder.merge(shard_bytes)
        except ValueError:
            if args.shard is None and not folder.ready():  # nothing that a key was made for
                folder.remove()
                if created:
                    salt_path.unlink(missing_ok=True)
            raise
    if args.key_map is not None:
        _write_key_map(args.key_map, report.rows)
    _print_guesses(report)
    if args.shard is not None:
        print(f"shard {args.shard.number}/{args.shard.count}: {len(report.rows)} scans are ready, {refused} refused")
        print(f"when all shards have ended: agssd merge {out}")
    else:
        print_summary(out)
        print(f"{refused} refused, {plan.ignored} files ignored")
    return 3 if refused else 0


class _Report:
    """What a build did."""

    def __init__(self) -> None:
        self.refused = 0
        self.rows: list[tuple[str, str, str]] = []  # case key, subject, path
        self.guesses: dict[str, list[Path]] = defaultdict(list)  # what was decided and why -> files


def _build(
    folder: BuildFolder,
    workshop: Workshop,
    jobs: Sequence[tuple[Job, str]],
    shard_bytes: int | None,
    args: argparse.Namespace,
) -> _Report:
    """Prepare what is not ready and say what became of every scan."""
    from agssd.scans.parallel import WorkerDiedError

    if not folder.locked:
        print("note: this file system keeps no locks; make sure that no other process builds the same cache")
    mine = list(jobs) if args.shard is None else list(jobs)[args.shard.number :: args.shard.count]
    decided = {} if args.shard is not None else folder.decided(shard_bytes)
    report = _Report()
    if decided:
        print("note: going on where an interrupted build stood: all scans are ready")
        kept = [(job, decided[digest]) for job, digest in mine if digest in decided]
        report.rows = [(info.key, job.subject, _names(job)) for job, info in kept]
        report.refused = len(mine) - len(kept)
    else:
        ready = [path for _, digest in jobs if (path := workshop.path(digest)).is_file()]
        done = sum(workshop.path(digest).is_file() for _, digest in mine)
        if done:
            print(f"note: going on where an interrupted build stood: {done} of {len(mine)} scans are done")
        if not args.no_forecast:
            sample = sample_of_parts(ready)
            if not ready and len(mine) >= FORECAST_FROM:
                sample = prepare_sample([job for job, _ in mine], workshop)
            go_on = folder.how_to_go_on(OSError(errno.ENOSPC, ""))
            check_room(folder.out.parent, sample, len(jobs), len(ready), len(mine), args.workers, shard_bytes, go_on)
        try:
            _make_parts(report, workshop, mine, args.workers)
        except BrokenPipeError:  # stdout is gone, not the disk
            raise
        except OSError as error:
            raise ValueError(f"cannot write {folder.parts}: {error.strerror}{folder.how_to_go_on(error)}") from error
        except WorkerDiedError as error:
            raise ValueError(f"{error}{folder.how_to_go_on()}") from error
    return report


def _make_parts(report: _Report, workshop: Workshop, jobs: Sequence[tuple[Job, str]], workers: int) -> None:
    from agssd.data_modules.parts import Refusal
    from agssd.scans.progress import progress

    known: dict[str, Path] = {}
    with progress(len(jobs), "scan") as bar:
        for job, result in _results(jobs, workshop, workers):
            bar.update()
            if isinstance(result, Refusal):
                bar.write(f"refused: {job.paths[0]}: {result.reason}", file=sys.stdout)
                report.refused += 1
                continue
            twin = known.setdefault(result.info.source_sha256, job.paths[0])
            if twin != job.paths[0]:
                bar.write(f"refused: {job.paths[0]}: same bytes as {twin}", file=sys.stdout)
                report.refused += 1
                continue
            for note in result.notes:
                bar.write(f"note: {job.paths[0]}: {note}", file=sys.stdout)
            if result.modality_reason:
                report.guesses[f"{result.info.modality}, because {result.modality_reason}"].append(job.paths[0])
            report.rows.append((result.info.key, job.subject, _names(job)))


def _names(job: Job) -> str:
    return ";".join(str(path) for path in job.paths)


def _results(jobs: Sequence[tuple[Job, str]], workshop: Workshop, workers: int) -> Iterator[tuple[Job, Part | Refusal]]:
    """Yield every job with what it gave, in the order of the jobs; what an earlier build left is not done again."""
    from functools import partial

    from agssd.data_modules.parts import Refusal
    from agssd.scans.parallel import in_order

    def left(item: tuple[Job, str]) -> Part | Refusal | None:
        found = workshop.found(item[1])
        return None if isinstance(found, Refusal) and not found.final else found

    for (job, _), result in in_order(partial(_make, workshop), jobs, workers, left):
        yield job, result


def _make(workshop: Workshop, item: tuple[Job, str]) -> Part | Refusal:
    return workshop.make(*item)


def positive(text: str) -> float:
    """Return the positive number that an argument states."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value


def _shard(text: str) -> Shard:
    from agssd.data_modules.build_folder import Shard

    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no I/N with I from 0 to N - 1, for example 0/16")
    return Shard(int(number), int(count))


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


def _print_guesses(report: _Report) -> None:
    for reason, paths in sorted(report.guesses.items()):
        names = ", ".join(path.name for path in paths[:5]) + (", ..." if len(paths) > 5 else "")
        print(f"modality: {len(paths)} scans are {reason}: {names}")


def print_summary(out: Path) -> None:
    """Print what a cache holds."""
    from agssd.data_modules.cache import VolumeCache
    from agssd.scans.preparing.volumes import same_spacing

    cache = VolumeCache(out)
    infos = cache.cases
    parts = []
    for split in ("train", "val", "test"):
        cases = [info for info in infos if info.split == split]
        parts.append(f"{len(cases)} {split} ({len({info.subject for info in cases})} subjects)")
    voxels = sum(info.shape[0] * info.shape[1] * info.shape[2] * info.channels for info in infos)
    labelled = sum(info.label_values is not None for info in infos)
    spacings = {info.modality: info.spacing_mm for info in reversed(infos)}  # of the first case of each
    if len(spacings) > 1 and not same_spacing(*spacings.values()):
        kinds = " and ".join(f"{kind} at {_numbers(spacings[kind])} mm" for kind in sorted(spacings))
        print(
            f"note: {out} holds {kinds}, and one training takes one spacing: run agssd prepare once per --modality, or "
            "give one --spacing-mm"
        )
    _warn_of_subjects(cache)
    files = f" in {len(cache.files)} files" if len(cache.files) > 1 else ""
    print(f"{out}: {len(infos)} cases, {', '.join(parts)}; {labelled} with labels")
    print(f"{bytes_text(cache.size_bytes())}{files}, {voxels / 1e6:.1f} million voxels")


def _warn_of_subjects(cache: VolumeCache) -> None:
    """Say where scans of one person may lie in two splits, or scans of many persons count as one's."""
    from agssd.scans.preparing.perceptual import near_duplicates

    subjects = {info.subject for info in cache.cases}
    if len(subjects) == 1 and len(cache) >= 3:
        print(
            f"note: all {len(cache)} cases count as one subject, so all are in train; use --subject REGEX, or a "
            "manifest, if they are several"
        )
    held = [info for info in cache.cases if info.split != "train"]
    rest = [info for info in cache.cases if info.split == "train"]
    pairs = near_duplicates([info.perceptual_hash for info in held], [info.perceptual_hash for info in [*rest, *held]])
    others = [*rest, *held]
    torn = [(held[i], others[j]) for i, j, _ in pairs if held[i].split != others[j].split]
    if torn:
        one, two = torn[0]
        print(
            f"warning: {len(torn)} pairs of cases in different splits look like copies of one scan, for example "
            f"{one.key} ({one.split}) and {two.key} ({two.split}): agssd doctor {cache.path} names all; give them one "
            "subject, by --subject or in a manifest"
        )


def _numbers(values: Sequence[float]) -> str:
    return "x".join(f"{value:.3g}" for value in values)
