"""Look for what is wrong with scans or with a cache, before a training does."""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agssd.commands._which_scans import add_recipe_arguments, add_source_arguments, plan_of, recipe_of

if TYPE_CHECKING:
    from agssd.commands.doctor.across import Found, Member
    from agssd.commands.doctor.examine import Examined
    from agssd.commands.doctor.page import Report
    from agssd.scans.sources.jobs import Plan
    from agssd.scans.sources.quarantine import Entry

EXIT_FOUND = 3
_EXAMPLES = 2  # per check on the terminal, without --all
_OF_SOURCES: dict[str, Any] = {  # arguments that a cache has no use for, and their defaults
    "labels": [],
    "subject": None,
    "modality": "auto",
    "spacing_mm": None,
    "volume": None,
    "pet": False,
    "unshear": False,
    "quarantine": None,
}
_NO_FAULT = ("label-map", "no-scan", "not-used", "missing", "memory")  # of a scan: never put into quarantine


@dataclass
class _Quarantine:
    """What goes into the list, and of the scans that do not in spite of an error: why -> what -> how many."""

    entries: list[Entry] = field(default_factory=list)
    left_out: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``agssd doctor``."""
    add_source_arguments(parser, others="; or one cache")
    add_recipe_arguments(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write report.html and findings.csv there, in place of older ones"
    )
    parser.add_argument("--names", action="store_true", help="show paths in report.html too, not only in findings.csv")
    parser.add_argument("--all", action="store_true", help="print every finding, not only some of each kind")
    parser.add_argument(
        "--label-values",
        type=int,
        nargs="+",
        metavar="N",
        help="values that labels may hold; any other is an error. Without it those are named that few cases hold",
    )
    parser.add_argument(
        "--quarantine",
        type=Path,
        metavar="FILE.csv",
        help="write the scans with errors that no argument mends there, for agssd prepare --quarantine",
    )
    parser.add_argument("--quarantine-warnings", action="store_true", help="put scans with warnings there as well")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing quarantine file")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes; one scan in memory each")


def run(args: argparse.Namespace) -> int:
    """Examine; return 0 without errors found, 3 with, 1 when nothing could be examined."""
    try:
        return _doctor(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 1


def _doctor(args: argparse.Namespace) -> int:
    from agssd.commands.doctor.page import as_csv, as_html, summary
    from agssd.scans.sources.quarantine import quarantine_text

    _check_arguments(args)
    report, quarantine = _of_cache(args) if is_cache(args.source[0]) else _of_source(args)
    print(as_table(report, args.all))
    print(summary(report))
    if args.out is not None:
        from agssd.data_modules.parts import write_whole

        try:
            args.out.mkdir(parents=True, exist_ok=True)
            write_whole(args.out / "findings.csv", as_csv(report).encode())
            write_whole(args.out / "report.html", as_html(report, args.names).encode())
        except OSError as error:
            raise ValueError(f"cannot write into {args.out}: {error.strerror}") from error
        print(f"written: {args.out / 'report.html'}; {args.out / 'findings.csv'} (names files: keep it private)")
    if args.quarantine is not None:
        from agssd.data_modules.parts import write_whole

        try:
            write_whole(args.quarantine, quarantine_text(quarantine.entries, args.quarantine).encode())
        except OSError as error:
            raise ValueError(f"cannot write {args.quarantine}: {error.strerror}") from error
        print(f"written: {args.quarantine} with {len(quarantine.entries)} scans, for agssd prepare --quarantine")
        for why, counts in quarantine.left_out.items():
            print(f"not in it, {why}: {', '.join(f'{count} {what}' for what, count in sorted(counts.items()))}")
    return EXIT_FOUND if report.count("error") else 0


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuse before hours of reading what would be refused after them."""
    cache = any(is_cache(source) for source in args.source)
    if cache and len(args.source) > 1:
        raise ValueError("a cache is examined alone: give one cache, or sources only")
    if cache and (given := [name for name, default in _OF_SOURCES.items() if getattr(args, name) != default]):
        names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{names} can be given for sources only; {args.source[0]} is a cache")
    if args.workers < 1:
        raise ValueError(f"--workers is {args.workers}; it must be at least 1")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; name a folder")
    if args.quarantine_warnings and args.quarantine is None:
        raise ValueError("--quarantine-warnings needs --quarantine FILE")
    if args.quarantine is not None:
        if args.quarantine.exists() and not args.overwrite:
            raise ValueError(f"{args.quarantine} exists; name another file or pass --overwrite")
        if not args.quarantine.parent.is_dir():
            raise ValueError(f"the folder {args.quarantine.parent} does not exist; create it first")


def is_cache(path: Path) -> bool:
    """Return whether a path is meant as a cache: an HDF5 file, whole or damaged, or the folder of a large cache."""
    from agssd.data_modules.cache import INDEX_NAME

    if path.is_dir():
        return (path / INDEX_NAME).is_file()
    if path.suffix.lower() in (".h5", ".hdf5"):
        return True
    try:
        with path.open("rb") as file:
            return file.read(8) == b"\x89HDF\r\n\x1a\n"
    except OSError:
        return False


def _of_source(args: argparse.Namespace) -> tuple[Report, _Quarantine]:
    from agssd.commands.doctor.across import check_source
    from agssd.commands.doctor.examine import SourceExaminer
    from agssd.commands.doctor.page import Report
    from agssd.scans.findings import refusal

    _, plan = plan_of(args, (args.out or Path()) / "downloads")
    for note in plan.notes:
        print(f"note: {note}")
    if not plan.jobs and not plan.refused:
        raise ValueError("no scan was found")
    names = [";".join(str(path) for path in job.paths) for job in plan.jobs]
    examiner = SourceExaminer(recipe_of(args), pictures=args.out is not None)
    report = Report("scans", len(names) + len(plan.refused), len({job.subject for job in plan.jobs}))
    members = _examine(report, examiner, plan.jobs, names, args.workers)
    for number, (path, reason) in enumerate(plan.refused, len(names) + 1):
        report.names[number] = str(path)
        report.found.append((number, refusal(reason, [path])))
    _add(report, check_source(members, args.label_values))
    return report, _quarantine(report, plan, args.quarantine_warnings) if args.quarantine else _Quarantine()


def _of_cache(args: argparse.Namespace) -> tuple[Report, _Quarantine]:
    from agssd.commands.doctor.across import check_cache
    from agssd.commands.doctor.examine import CacheExaminer
    from agssd.commands.doctor.page import Report
    from agssd.data_modules.cache import VolumeCache
    from agssd.scans.findings import Finding

    path: Path = args.source[0]
    try:
        cache = VolumeCache(path)
    except ValueError as error:
        if not path.exists():
            raise
        found = [(0, Finding("cache", "error", "The cache cannot be opened.", str(error)))]
        return Report("cases", 0, 0, found), _Quarantine()
    report = Report("cases", len(cache), len({info.subject for info in cache.cases}))
    names = [info.key for info in cache.cases]
    examiner = CacheExaminer(path, pictures=args.out is not None)
    members = _examine(report, examiner, range(len(cache)), names, args.workers)
    _add(report, check_cache(cache, members, args.label_values))
    return report, _Quarantine()


def _examine(
    report: Report, examiner: Callable[[Any], Examined], items: Iterable[Any], names: list[str], workers: int
) -> list[Member]:
    """Examine every item into the report, and return those that can be compared."""
    from agssd.commands.doctor.across import Member
    from agssd.scans.parallel import in_order
    from agssd.scans.progress import progress

    members = []
    with progress(len(names), "scan") as bar:
        for number, (_, done) in enumerate(in_order(examiner, items, workers), 1):
            bar.update()
            report.names[number] = names[number - 1]
            report.found += [(number, finding) for finding in done.findings]
            if done.picture is not None:
                report.pictures[number] = done.picture
            if done.info is not None:
                members.append(Member(number, names[number - 1], done.info, done.class_name))
    return members


def _add(report: Report, found: list[Found]) -> None:
    """Add findings that took all cases, in the order of the cases; those of one check and case become one."""
    from agssd.scans.findings import Finding, merged

    by_case: dict[int, list[Finding]] = {}
    for number, finding in [*report.found, *found]:
        by_case.setdefault(number, []).append(finding)
    of_set = by_case.pop(0, [])
    report.found[:] = [(0, finding) for finding in of_set]
    report.found += [(number, finding) for number in sorted(by_case) for finding in merged(by_case[number])]


def _quarantine(report: Report, plan: Plan, warnings: bool) -> _Quarantine:
    """Return what belongs into quarantine: scans with errors, and with warnings if asked for.

    Not those whose only errors are no fault of a scan, or one that an argument of ``prepare`` mends: in the list they
    would be left out in spite of the argument.
    """
    from dataclasses import replace

    from agssd.scans.sources.files import data_files
    from agssd.scans.sources.quarantine import Entry, source_sha256

    severities = ("error", "warning") if warnings else ("error",)
    reasons: dict[int, list[str]] = {}
    found = [(number, finding) for number, finding in report.found if number and finding.severity in severities]
    for number, finding in found:
        if finding.check not in _NO_FAULT and finding.argument is None:
            reasons.setdefault(number, []).append(finding.text)
    made = _Quarantine()
    for number, finding in found:
        if number not in reasons:
            why = (
                "for it is no fault of the scan" if finding.argument is None else "for an argument lets prepare take it"
            )
            made.left_out[why][finding.argument or finding.check] += 1
    scans = [(job.paths[0], replace(job, label=None).files()) for job in plan.jobs]
    scans += [(path, [] if path.is_dir() else data_files(path)) for path, _ in plan.refused]
    for number, texts in sorted(reasons.items()):
        path, files = scans[number - 1]
        made.entries.append(Entry(path, "; ".join(texts), source_sha256(files) if files else None))
    return made


def as_table(report: Report, everything: bool = False) -> str:
    """Return the findings by check: how many, some of them by name, and the remedy."""
    from agssd.scans.findings import CHECKS

    lines = []
    for severity, check, items in report.groups():
        lines.append(f"{severity:<8} {check:<15} {len(items):>5}  {CHECKS[check].title}")
        for number, finding in items if everything else items[:_EXAMPLES]:
            who = f"#{number} {report.names.get(number, '')}: " if number else ""
            lines.append(f"         {who}{finding.text}")
        if not everything and len(items) > _EXAMPLES:
            lines.append(f"         and {len(items) - _EXAMPLES} more (--all)")
        lines.append(f"         -> {CHECKS[check].remedy}")
    return "\n".join(lines) if lines else "nothing found"
