"""Write a cohort of simulated heads, or of deformed copies of a labelled CT, as NIfTI with a manifest for prepare."""

from __future__ import annotations

import argparse
from pathlib import Path

NOTICE = (
    "The cohort is simulated: every subject is the same scan, deformed and degraded by torchio. Figures measured on\n"
    "it say how methods compare on one anatomy, and nothing about patients."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``agssd simulate``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "heads of the MNI152 average, labels 1 grey and 2 white matter:\n"
        "  agssd simulate --out heads --subjects 24 4 16 --spacing-mm 2.5\n"
        "deformed copies of a labelled CT:\n"
        "  agssd simulate --out torsos --scan ct.nii.gz --label seg.nii.gz --label-groups conf/labels/torso.yaml \\\n"
        "    --subjects 24 4 16 --spacing-mm 4"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for images, labels and manifest.csv")
    parser.add_argument(
        "--subjects", type=int, nargs=3, required=True, metavar=("TRAIN", "VAL", "TEST"), help="subjects of each split"
    )
    parser.add_argument("--spacing-mm", type=float, required=True, metavar="S", help="of the isotropic grid")
    parser.add_argument("--scan", type=Path, metavar="FILE", help="a CT to deform instead of the MNI152 head")
    parser.add_argument("--label", type=Path, metavar="FILE", help="its label map")
    parser.add_argument("--label-groups", type=Path, metavar="FILE", help="as in `agssd prepare`")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the cohort (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Write the cohort and return 0.

    Raises:
        ValueError: for a folder with content, impossible numbers, or a scan that cannot be used.
    """
    from agssd.scans.preparing.label_groups import read_label_groups
    from agssd.scans.progress import progress
    from agssd.scans.simulated.heads import write_cohort
    from agssd.scans.simulated.torsos import load_labelled_scan, write_copies

    if min(args.subjects) < 0 or args.subjects[0] < 1:
        raise ValueError(f"--subjects is {args.subjects}; give at least 1 of train, and 0 or more of val and test")
    if not args.spacing_mm > 0:
        raise ValueError(f"--spacing-mm is {args.spacing_mm}; give a positive number")
    if (args.scan is None) != (args.label is None) or (args.label_groups and args.scan is None):
        raise ValueError("--scan and --label belong together, and --label-groups to them")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"--out {args.out} is not empty; name a new folder")
    print(NOTICE)
    counts = dict(zip(("train", "val", "test"), args.subjects, strict=True))
    with progress(sum(args.subjects), "subject") as bar:

        def done(*_: int) -> None:
            bar.update()

        if args.scan is None:
            manifest = write_cohort(args.out, counts, args.spacing_mm, args.seed, done)
        else:
            groups = None if args.label_groups is None else read_label_groups(args.label_groups)
            scan = load_labelled_scan(args.scan, args.label, groups, args.spacing_mm)
            manifest = write_copies(args.out, counts, scan, args.seed, done)
    print(f"written: {manifest}")
    return 0
