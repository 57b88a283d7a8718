"""Write what prepare would take of scans as a CSV manifest: to be looked at, changed, or given classes."""

from __future__ import annotations

import argparse
import csv
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from agssd.commands._which_scans import add_source_arguments, plan_of, tell

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from agssd.scans.sources.jobs import Job, Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``agssd manifest``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "files of one person as channels (BraTS):\n"
        "  agssd manifest BRATS --labels '*_seg.nii.gz' --channels flair t1 t1ce t2 --modality mri --out brats.csv\n"
        "classes of a classification from what is labelled:\n"
        "  agssd manifest HIPPOCAMPUS --labels 'labelsTr/*' --class-by share-of-label-1 --out head.csv\n"
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
        choices=tuple(MEASURES),
        help="column class: 'large' and 'small' by all that is labelled in mm3, or by the share of label 1 in it: "
        "above the upper and below the lower third of the cases that are not in split test. What lies between is left "
        "out, what has no label refused",
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
        plan.jobs = classes_by(plan, args.class_by)
    tell(plan)
    if not plan.jobs:
        raise ValueError("no scan to write; no manifest was written")
    write_manifest(args.out, plan.jobs)
    kinds = Counter(job.class_name for job in plan.jobs if job.class_name is not None)
    told = ", ".join(f"{count} {name}" for name, count in sorted(kinds.items()))
    print(f"{args.out}: {len(plan.jobs)} cases of {len({job.subject for job in plan.jobs})} subjects", end="")
    print(f"; {told}" if told else "")
    return 3 if plan.refused else 0


def join_channels(plan: Plan, words: Sequence[str]) -> list[Job]:
    """Return one job for the files of a folder whose names differ in the last word alone, a channel for each word.

    What is not one of the words, or lacks one of the others, is refused in the plan.
    """
    from agssd.scans.sources.files import stem_of

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


def classes_by(plan: Plan, measure: str) -> list[Job]:
    """Return the jobs of the upper and the lower third by a name in ``MEASURES``, with their class."""
    import numpy as np

    from agssd.scans.case import RefusedError
    from agssd.scans.read import read_scan

    found: list[tuple[Job, float]] = []
    for job in plan.jobs:
        if job.label is None:
            plan.refused.append((job.paths[0], "it has no label, by which it would be classed"))
            continue
        try:
            scan = read_scan(job.label)
            voxel_mm3 = abs(float(np.linalg.det(scan.affine[:3, :3])))
            found.append((job, MEASURES[measure](np.rint(scan.array).astype(np.int64), voxel_mm3)))
        except RefusedError as error:
            plan.refused.append((job.paths[0], f"its label {job.label}: {error}"))
    if not found:
        return []
    known = [value for job, value in found if job.split != "test"] or [value for _, value in found]
    low, high = np.quantile(known, [1 / 3, 2 / 3])
    between = sum(low <= value <= high for _, value in found)
    plan.notes.append(
        f"the thirds by {measure} of {len(known)} cases part at {low:.4g} and {high:.4g}; {between} between are left "
        "out"
    )
    return [
        replace(job, class_name="large" if value > high else "small")
        for job, value in found
        if not low <= value <= high
    ]


def _volume(label: NDArray[np.int64], voxel_mm3: float) -> float:
    return float((label > 0).sum()) * voxel_mm3


def _share(label: NDArray[np.int64], voxel_mm3: float) -> float:
    from agssd.scans.case import RefusedError

    if not (label > 0).any():
        raise RefusedError("nothing is labelled")
    return float((label == 1).sum() / (label > 0).sum())


MEASURES = {"label-volume": _volume, "share-of-label-1": _share}


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
