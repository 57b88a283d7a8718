"""Write what prepare would take of scans as a CSV manifest: to be looked at, changed, or given classes."""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from agssd.commands._which_scans import add_source_arguments, plan_of

if TYPE_CHECKING:
    from agssd.scans.jobs import Job, Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``agssd manifest``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "files of one person as channels (BraTS):\n"
        "  agssd manifest BRATS --labels '*_seg.nii.gz' --channels flair t1 t1ce t2 --modality mri --out brats.csv\n"
        "classes of a classification from what is labelled:\n"
        "  agssd manifest HIPPOCAMPUS --labels 'labelsTr/*' --class-by label-volume --out size.csv\n"
        "then: agssd prepare brats.csv --out brats.h5"
    )
    add_source_arguments(parser)
    parser.add_argument(
        "--channels",
        nargs="+",
        metavar="WORD",
        help="files of one folder whose names differ only in these last words are the channels of one case, in this "
        "order; what lacks a channel is refused",
    )
    parser.add_argument(
        "--class-by",
        choices=("label-volume",),
        help="column class: 'large' where all that is labelled takes more mm3 than the median of the cases that are "
        "not in split test, else 'small'; what has no label is refused",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv", help="manifest to write")


def run(args: argparse.Namespace) -> int:
    """Write the manifest; return 0, or 3 when some was refused.

    Raises:
        ValueError: where there is nothing to write, or the file exists.
    """
    if args.out.exists():
        raise ValueError(f"--out {args.out} exists; remove it, or name another file")
    _, plan = plan_of(args, args.out.parent / "downloads")
    if args.channels:
        plan.jobs = join_channels(plan, args.channels)
    if args.class_by is not None:
        plan.jobs = classes_by_volume(plan)
    for note in plan.notes:
        print(f"note: {note}")
    for path, reason in plan.refused:
        print(f"refused: {path}: {reason}")
    if not plan.jobs:
        raise ValueError("no scan to write; no manifest was written")
    write_manifest(args.out, plan.jobs)
    kinds = defaultdict(int)
    for job in plan.jobs:
        kinds[job.class_name] += 1
    told = ", ".join(f"{count} {name}" for name, count in sorted(kinds.items(), key=str) if name is not None)
    print(f"{args.out}: {len(plan.jobs)} cases of {len({job.subject for job in plan.jobs})} subjects", end="")
    print(f"; {told}" if told else "", file=sys.stdout)
    return 3 if plan.refused else 0


def join_channels(plan: Plan, words: Sequence[str]) -> list[Job]:
    """Return one job for the files of a folder whose names differ in the last word alone, a channel for each word.

    What is not one of the words, or lacks one of the others, is refused in the plan.
    """
    from agssd.scans.files import stem_of

    found: dict[tuple[Path, str], dict[str, Job]] = defaultdict(dict)
    for job in plan.jobs:
        stem = stem_of(job.paths[0])
        word = next((one for one in sorted(words, key=len, reverse=True) if stem.endswith(one)), None)
        trunk = "" if word is None else stem.removesuffix(word)
        if word is None or (trunk and trunk[-1].isalnum()):
            plan.refused.append((job.paths[0], f"its name ends in none of the channels {', '.join(words)}"))
        else:
            found[job.paths[0].parent, trunk][word] = job
    jobs = []
    for channels in found.values():
        if missing := [word for word in words if word not in channels]:
            plan.refused += [
                (job.paths[0], f"the channel {missing[0]} lies not beside it") for job in channels.values()
            ]
            continue
        first = channels[words[0]]
        label = next((job.label for job in channels.values() if job.label is not None), None)
        jobs.append(replace(first, paths=tuple(channels[word].paths[0] for word in words), label=label))
    return jobs


def classes_by_volume(plan: Plan) -> list[Job]:
    """Return the labelled jobs with the class "large" or "small" by the volume of all labels; see ``--class-by``."""
    import numpy as np

    from agssd.scans.case import RefusedError
    from agssd.scans.read import read_scan

    volumes: list[tuple[Job, float]] = []
    for job in plan.jobs:
        if job.label is None:
            plan.refused.append((job.paths[0], "it has no label, by whose volume it would be classed"))
            continue
        try:
            scan = read_scan(job.label)
        except RefusedError as error:
            plan.refused.append((job.paths[0], f"its label {job.label}: {error}"))
            continue
        voxel_mm3 = abs(float(np.linalg.det(scan.affine[:3, :3])))
        volumes.append((job, float(np.count_nonzero(np.rint(scan.array))) * voxel_mm3))
    if not volumes:
        return []
    known = [volume for job, volume in volumes if job.split != "test"] or [volume for _, volume in volumes]
    middle = statistics.median(known)
    plan.notes.append(f"the median labelled volume of {len(known)} cases is {middle:.0f} mm3; more is 'large'")
    return [replace(job, class_name="large" if volume > middle else "small") for job, volume in volumes]


def write_manifest(out: Path, jobs: Sequence[Job]) -> None:
    """Write jobs as ``agssd prepare`` reads them, with absolute paths."""
    from agssd.whole_file import whole_file

    columns = ("path", "subject", "modality", "label_path", "class", "split", "volume")
    rows = []
    for job in jobs:
        if any(";" in str(path) for path in job.paths):
            raise ValueError(
                f"{job.paths[0]} has a semicolon in its path, which parts channels in a manifest; rename it"
            )
        paths = ";".join(str(path.absolute()) for path in job.paths)
        label = "" if job.label is None else job.label.absolute()
        others = ("" if value is None else value for value in (job.class_name, job.split, job.volume))
        rows.append([paths, job.subject, job.modality or "", label, *others])
    with whole_file(out) as path, path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
