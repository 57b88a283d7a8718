"""What ``prepare`` and ``doctor`` have in common: the arguments that say which scans are meant and how to read them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agssd.scans.preparing.volumes import Recipe
    from agssd.scans.sources.jobs import Plan


def add_source_arguments(parser: argparse.ArgumentParser, others: str = "") -> None:
    """Declare the sources and which scans of them are meant; ``others`` is said of what else SOURCE may be."""
    parser.add_argument(
        "source",
        nargs="+",
        type=Path,
        help="file, folder (searched recursively; DICOM series in it are found), CSV manifest, or public set by name: "
        "msd:Task04_Hippocampus, medmnist3d:organ, ixi-tiny, ixi:T1, ... (an unknown name, such as msd:, lists all)"
        + others,
    )
    parser.add_argument(
        "--download-dir",
        type=Path,
        metavar="DIR",
        help="where public sets are, or are downloaded to once; default: the folder downloads beside the result",
    )
    parser.add_argument(
        "--modality",
        choices=("ct", "mri", "us", "auto"),
        default="auto",
        help="default: decide per file; us: frames "
        "of ultrasound, from pictures (PNG, JPEG), sequences (MetaImage, NRRD) and DICOM, for 2D encoders",
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


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how scans are prepared."""
    parser.add_argument(
        "--spacing-mm",
        type=_millimetres,
        nargs="+",
        metavar="S",
        help="voxel size, one number or three in the order superior, anterior, right; default 1.5 for CT, 1.0 for MRI",
    )
    parser.add_argument(
        "--unshear",
        action="store_true",
        help="resample grids whose axes are not at right angles, as under gantry tilt; otherwise they are refused",
    )
    parser.add_argument(
        "--label-groups",
        type=Path,
        metavar="FILE.yaml",
        help="groups of label values, `kidneys: [2, 3]`; the n-th becomes class n, values in none background",
    )


def plan_of(args: argparse.Namespace, downloads: Path) -> tuple[list[Path], Plan]:
    """Return the sources, public sets by their place, and the plan of all of them with its notes.

    Args:
        args: parsed from :func:`add_source_arguments`.
        downloads: where public sets go unless ``--download-dir`` names another place.

    Raises:
        ValueError: as ``local_sources`` and ``plan_sources``.
    """
    from agssd.scans.sources.plan import plan_sources
    from agssd.scans.sources.public import local_sources

    sources, about_sets = local_sources(args.source, args.download_dir or downloads)
    modality = None if args.modality == "auto" else args.modality
    plan = plan_sources(sources, args.labels, args.subject, modality, args.volume, args.pet)
    plan.notes[:0] = about_sets
    return sources, plan


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Return how the scans are to be prepared."""
    from agssd.scans.preparing.label_groups import read_label_groups
    from agssd.scans.preparing.volumes import Recipe

    groups = None if args.label_groups is None else read_label_groups(args.label_groups)
    return Recipe(_spacing(args.spacing_mm), args.unshear, groups)


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


def tell(plan: Plan) -> None:
    """Print what the user should know of a plan, and what is refused."""
    for note in plan.notes:
        print(f"note: {note}")
    for path, reason in plan.refused:
        print(f"refused: {path}: {reason}")
