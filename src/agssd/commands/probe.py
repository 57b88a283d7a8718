"""Compare frozen encoders by patch-token linear segmentation, with paired intervals."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from agssd.data_modules.cache import VolumeCache
    from agssd.evaluation.segmentation_probe import ProbeCase
    from agssd.models.backbone import Backbone
    from agssd.types import Triple

RANDOM = "random"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``agssd probe``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "One linear layer from a frozen token to the classes of the voxels of its patch, fitted and measured by folds\n"
        "of the split 'train' (other splits stay untouched). Encoders of one NAME are seeds of one method; the n-th\n"
        "seeds of two names are compared with each other.\n\n"
        "  agssd probe hippo.h5 --encoder agssd=runs/s0 --encoder agssd=runs/s1 --encoder agssd=runs/s2 --random"
    )
    parser.add_argument("cache", metavar="CACHE", help="labelled cache written by agssd prepare")
    parser.add_argument(
        "--encoder",
        metavar="[NAME=]PATH",
        action="append",
        default=[],
        help="an export, a checkpoint or a run directory; repeat for more. Without NAME the name of the folder or file",
    )
    parser.add_argument(
        "--random",
        metavar="PATH",
        nargs="?",
        const="",
        help="also random weights of the architecture in PATH (default: of the first --encoder)",
    )
    parser.add_argument("--random-seeds", type=int, metavar="N", help="how many (default: most seeds of a name)")
    parser.add_argument("--num-classes", type=int, metavar="K", help="with background (default: from the labels)")
    parser.add_argument("--folds", type=int, default=5, metavar="N", help="folds by subject (default: 5)")
    parser.add_argument(
        "--num-subjects", type=int, metavar="N", help="labelled subjects per fold to learn from (default: all)"
    )
    parser.add_argument("--subset-seed", type=int, default=0, metavar="S", help="which draw of them (default: 0)")
    parser.add_argument(
        "--window-vox",
        type=int,
        nargs="+",
        metavar="V",
        help="window: one number or three (D H W), the size of view in pretraining (default: 4 patches per axis)",
    )
    parser.add_argument("--overlap", type=float, default=0.5, metavar="F", help="of windows (default: 0.5)")
    parser.add_argument("--device", default="cpu", help="for the features (default: cpu)")
    parser.add_argument("--out", metavar="FILE.json", help="write every figure there")
    parser.add_argument(
        "--ignore-contract", action="store_true", help="accept a cache prepared differently from the encoder's"
    )


def run(args: argparse.Namespace) -> int:
    """Probe every encoder, print the table and the paired differences; 1 with the reason on stderr if that fails."""
    try:
        report = probe(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_report(report)
    if args.out:
        path = Path(args.out)
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
        print(f"written     {path}")
    return 0


def probe(args: argparse.Namespace) -> dict[str, Any]:
    """Return every figure of the comparison in plain types.

    Raises:
        ValueError: for caches, encoders or settings that cannot be used.
    """
    import numpy as np

    from agssd.data_modules.cache import VolumeCache
    from agssd.data_modules.subsets import fold_subjects, nested_subset
    from agssd.evaluation.segmentation_probe import probe_segmentation
    from agssd.evaluation.statistics import bootstrap_mean, paired_difference

    encoders = _encoders(args)
    cache = VolumeCache(args.cache)
    rows = cache.select(split="train", labelled=True)
    if not rows:
        raise ValueError(f"{args.cache} has no labelled case in its split 'train'; see agssd inspect {args.cache}")
    values = {value for row in rows for value in cache.cases[row].label_values or ()}
    num_classes = args.num_classes or max(values) + 1
    if min(values) < 0 or max(values) >= num_classes or num_classes < 2:
        raise ValueError(
            f"labels in {args.cache} hold {min(values)} to {max(values)}, which needs --num-classes {max(values) + 1}"
        )
    folds = fold_subjects([cache.cases[row].subject for row in rows], args.folds)
    learned = None
    if args.num_subjects is not None:
        learned = [
            nested_subset(
                [s for fold in folds if fold is not held for s in fold], args.num_subjects, None, args.subset_seed
            )
            for held in folds
        ]
    _check_contracts(encoders, cache, rows, args.ignore_contract)
    subjects = [subject for fold in folds for subject in fold]
    figures: dict[str, list[np.ndarray]] = {}  # per name and seed (subjects, classes)
    for name, backbone in encoders:
        started = time.perf_counter()
        cases = features(cache, rows, backbone, _window(args.window_vox, backbone), args.overlap, args.device)
        found = probe_segmentation(cases, folds, num_classes, learned)
        figures.setdefault(name, []).append(np.stack([found[subject] for subject in subjects]))
        mean = float(np.nanmean(figures[name][-1]))
        print(
            f"{name} seed {len(figures[name]) - 1}: Dice {mean:.4f} ({time.perf_counter() - started:.0f} s)", flush=True
        )
    # a subject's figure is the mean over the classes that it has
    tables = {name: np.stack([np.nanmean(seed, 1) for seed in seeds]) for name, seeds in figures.items()}
    return {
        "cache": str(args.cache),
        "num_cases": len(rows),
        "num_subjects": len(subjects),
        "folds": args.folds,
        "labelled_subjects_per_fold": args.num_subjects or "all",
        "encoders": {
            name: {
                "seeds": len(tables[name]),
                "dice": bootstrap_mean(tables[name])._asdict(),
                "dice_by_class": np.nanmean(np.stack(figures[name]), (0, 1)).tolist(),
                "dice_by_seed": tables[name].mean(1).tolist(),
                "dice_by_seed_and_subject": tables[name].tolist(),
                "held_out_seen": [
                    _seen(backbone, cache, rows) for known, backbone in encoders if known == name != RANDOM
                ],
            }
            for name in tables
        },
        "differences": [
            {"first": a, "second": b, **_difference(paired_difference, tables[a], tables[b])}
            for a, b in combinations(tables, 2)
        ],
    }


def _difference(paired_difference: Any, first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    shared = min(len(first), len(second))
    if shared > 1:
        first, second = first[:shared], second[:shared]
    return dict(paired_difference(first, second)._asdict())


def _encoders(args: argparse.Namespace) -> list[tuple[str, Backbone]]:
    """Return (name, encoder) in the order given, random ones last."""
    from agssd.tasks.encoders import load_encoder, random_like

    found: list[tuple[str, Backbone]] = []
    for text in args.encoder:
        name, equals, path = text.partition("=")
        if not equals:
            path, name = text, Path(text).stem if Path(text).suffix else Path(text).name
        if name == RANDOM:
            raise ValueError(f"--encoder {text}: the name {RANDOM!r} is kept for --random; choose another")
        found.append((name, load_encoder(path)))
    if args.random is not None:
        if not args.random and not found:
            raise ValueError("--random needs a PATH to an exported encoder, or an --encoder whose architecture to take")
        pattern = load_encoder(args.random) if args.random else found[0][1]
        names = [name for name, _ in found]
        seeds = args.random_seeds or max((names.count(name) for name in names), default=1)
        found += [(RANDOM, random_like(pattern, seed)) for seed in range(seeds)]
    if not found:
        raise ValueError("nothing to probe: give --encoder [NAME=]PATH, and --random to compare with random weights")
    return found


def _check_contracts(
    encoders: Sequence[tuple[str, Backbone]], cache: VolumeCache, rows: Sequence[int], ignore: bool
) -> None:
    from agssd.data_modules.agreement import cache_contract
    from agssd.evaluation.contract import check_contract

    contract = cache_contract([cache.cases[row] for row in rows])
    for name, backbone in encoders:
        if contract["channels"] != backbone.in_channels:
            raise ValueError(
                f"{cache.path} has {contract['channels']} channel(s), encoder {name} takes {backbone.in_channels}"
            )
        if not ignore:
            check_contract(backbone.contract, contract, name, "--ignore-contract")


def _seen(backbone: Backbone, cache: VolumeCache, rows: Sequence[int]) -> dict[str, int] | None:
    """Return how many held-out subjects and copies of scans the encoder was trained on; None where nobody knows."""
    from agssd.data_modules.leakage import overlap

    seen = (backbone.contract or {}).get("seen")
    if seen is None:
        return None
    found = overlap(seen, [cache], [(0, row) for row in rows])
    return {"subjects": len(found.subjects), "near_duplicates": len(found.duplicates)}


def _window(given: Sequence[int] | None, backbone: Backbone) -> Triple:
    patch = backbone.patch_size
    if given is None:
        return (4 * patch[0], 4 * patch[1], 4 * patch[2])
    if len(given) not in (1, 3):
        raise ValueError(f"--window-vox takes one number or three, got {list(given)}")
    sizes = list(given) * 3 if len(given) == 1 else list(given)
    return (sizes[0], sizes[1], sizes[2])


def features(
    cache: VolumeCache, rows: Sequence[int], backbone: Backbone, window_vox: Triple, overlap: float, device: str
) -> list[ProbeCase]:
    """Return the tokens of each case with the labels under them.

    Args:
        cache: where the cases are.
        rows: which of them, all labelled.
        backbone: the frozen encoder.
        window_vox: window in voxels.
        overlap: of neighbouring windows.
        device: where the encoder runs.
    """
    import torch

    from agssd.evaluation.segmentation_probe import ProbeCase, patch_labels, window_tokens
    from agssd.transforms.intensity import to_model_range

    backbone = backbone.to(device).eval()
    cases = []
    for row in rows:
        info = cache.cases[row]
        stored = torch.from_numpy(cache.read_whole(row, "image")).float()[None]  # (1, C, D, H, W)
        scale, offset, low, high = (torch.tensor([getattr(info, n)]) for n in ("scale", "offset", "low", "high"))
        real = stored * scale[:, :, None, None, None] + offset[:, :, None, None, None]
        image = to_model_range(real, low, high, torch.tensor([info.modality == "ct"]))[0]
        label = torch.from_numpy(cache.read_whole(row, "label"))
        cases.append(
            ProbeCase(
                info.subject,
                window_tokens(backbone, image, window_vox, overlap),
                patch_labels(label, backbone.patch_size, window_vox),
            )
        )
    return cases


def print_report(report: dict[str, Any]) -> None:
    """Print one line per encoder and one per pair."""
    print(
        f"\nlinear token segmentation, {report['num_cases']} volumes of {report['num_subjects']} subjects, "
        f"{report['folds']} folds, {report['labelled_subjects_per_fold']} labelled subjects per fold"
    )
    print(f"{'encoder':<20}{'seeds':>6}{'Dice':>9}{'95 % interval':>20}   by class")
    for name, row in report["encoders"].items():
        dice = row["dice"]
        classes = " ".join(f"{value:.3f}" for value in row["dice_by_class"])
        print(f"{name:<20}{row['seeds']:>6}{dice['mean']:>9.4f}{_interval(dice):>20}   {classes}")
    for name, row in report["encoders"].items():
        for found in row["held_out_seen"][:1]:  # seeds of one method are trained alike; the file holds all
            told = "unknown how many" if found is None else str(found["subjects"])
            copies = (
                f" and of {found['near_duplicates']} further scans a copy" if found and found["near_duplicates"] else ""
            )
            print(
                f"{name} has seen {told} of the {report['num_subjects']} held-out subjects in its own training{copies}"
            )
    for row in report["differences"]:
        shown = "" if row["low"] > 0 or row["high"] < 0 else "   no difference shown"
        print(f"{row['first']} - {row['second']}: {row['mean']:+.4f} {_interval(row, '+')}{shown}")


def _interval(row: dict[str, float], sign: str = "") -> str:
    return f"[{row['low']:{sign}.4f}, {row['high']:{sign}.4f}]"
