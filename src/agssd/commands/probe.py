"""Compare frozen encoders by segmentation from tokens and classification of volumes, with paired intervals."""

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
    from agssd.data_modules.probe_set import ProbeSet
    from agssd.models.backbone import Backbone
    from agssd.types import Size

RANDOM = "random"
TITLES = {
    "linear-seg": "linear token segmentation",
    "knn-seg": "k-NN token segmentation",
    "knn-cls": "k-NN classification of volumes",
    "linear-cls": "logistic regression of volumes",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``agssd probe``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "linear-seg: one linear layer from a frozen token to the classes of the voxels of its patch; knn-seg: the\n"
        "label blocks of similar tokens vote; knn-cls and linear-cls: the class of a volume from its mean [CLS].\n"
        "Settings of a readout are chosen within its training subjects. Fitted and measured by folds of the split\n"
        "'train' (other splits stay untouched). Encoders of one NAME are seeds of one method; the n-th seeds of two\n"
        "names are compared. The probe while training (online_probe) gives the same figures at the same settings.\n\n"
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
    parser.add_argument(
        "--readout",
        nargs="+",
        choices=tuple(TITLES),
        default=["linear-seg"],
        help="what is fitted to the features (default: linear-seg)",
    )
    parser.add_argument("--folds", type=int, default=5, metavar="N", help="folds by subject (default: 5)")
    parser.add_argument("--on-val", action="store_true", help="learn from the split train, measure on val, no folds")
    parser.add_argument(
        "--num-subjects", type=int, metavar="N", help="labelled subjects per fold to learn from (default: all)"
    )
    parser.add_argument("--num-held-out", type=int, metavar="N", help="subjects per fold to measure on (default: all)")
    parser.add_argument("--subset-seed", type=int, default=0, metavar="S", help="which draw of them (default: 0)")
    parser.add_argument(
        "--window-vox",
        type=int,
        nargs="+",
        metavar="V",
        help="window: one number or three (D H W), the size of view in pretraining (default: 4 patches per axis)",
    )
    parser.add_argument(
        "--slices", metavar="MODEL", help="also a 2D model of timm on every slice, for example vit_small_patch16_dinov3"
    )
    parser.add_argument("--weights", metavar="PATH", help="of that model: a local file, or the word random")
    parser.add_argument("--slice-axis", choices=("axial", "coronal", "sagittal"), default="axial", help="of the slices")
    parser.add_argument(
        "--slice-patch-vox", type=int, default=8, metavar="V", help="in-plane voxels per token of slices (default: 8)"
    )
    parser.add_argument(
        "--depths",
        choices=("last", "all"),
        default="last",
        help="tokens: the encoder's output, or that of four depths side by side (default: last)",
    )
    parser.add_argument("--overlap", type=float, default=0.5, metavar="F", help="of windows (default: 0.5)")
    parser.add_argument(
        "--max-vox", type=int, metavar="V", help="voxels per axis from the middle of each volume (default: all of it)"
    )
    parser.add_argument("--linear-steps", type=int, default=300, metavar="N", help="steps of linear-seg (default: 300)")
    parser.add_argument("--precision", choices=("32", "bf16"), default="32", help="of the features (default: 32)")
    parser.add_argument("--device", default="cpu", help="for features and token readouts (default: cpu)")
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
        ValueError: for caches, encoders, settings or a device that cannot be used.
    """
    import torch

    from agssd.data_modules.cache import VolumeCache
    from agssd.data_modules.probe_set import ProbeSet
    from agssd.devices import check_device
    from agssd.evaluation.probe import all_finite, kinds_of, possible_readouts, run_readouts
    from agssd.evaluation.probe_features import encode

    check_device(args.device)
    cache = VolumeCache(args.cache)
    encoders = _encoders(args, cache)
    data = ProbeSet(
        cache,
        None if args.on_val else args.folds,
        args.num_subjects,
        args.num_held_out,
        args.subset_seed,
        max_vox=args.max_vox,
        num_label_classes=args.num_classes,
        kinds=kinds_of(args.readout),
    )
    if missing := set(args.readout) - set(possible_readouts(data)):
        raise ValueError(f"{args.cache} has no classes or labels for --readout {' '.join(sorted(missing))}")
    _check_contracts(encoders, cache, data.rows, args.ignore_contract)
    dtype = torch.bfloat16 if args.precision == "bf16" else None
    figures: dict[str, list[dict[str, float]]] = {}  # per name and seed
    found: dict[str, dict[str, list[dict[str, np.ndarray]]]] = {name: {} for name in args.readout}
    for name, backbone in encoders:
        started = time.perf_counter()
        backbone = backbone.to(args.device).eval()
        window = _window(args.window_vox, backbone)
        features = encode(backbone, data.volumes(), window, args.overlap, dtype, args.depths)
        if not all_finite(features):
            raise ValueError(f"encoder {name} gives features that are not finite; its weights have diverged")
        result = run_readouts(features, data, args.readout, args.linear_steps, args.device)
        figures.setdefault(name, []).append(result.figures)
        for readout, by_subject in result.by_subject.items():
            found[readout].setdefault(name, []).append(by_subject)
        told = ", ".join(f"{key} {result.figures[key]:.4f}" for key in map(_main_figure, args.readout))
        print(f"{name} seed {len(figures[name]) - 1}: {told} ({time.perf_counter() - started:.0f} s)", flush=True)
    return {
        "cache": str(args.cache),
        "num_cases": len(data.rows),
        "num_subjects": data.num_subjects,
        "folds": "val" if args.on_val else args.folds,
        "labelled_subjects_per_fold": args.num_subjects or "all",
        "encoders": {
            name: {
                "seeds": len(seeds),
                "figures_by_seed": seeds,
                "held_out_seen": [
                    _seen(backbone, data)
                    for known, backbone in encoders
                    if known == name and not name.startswith(RANDOM)
                ],
            }
            for name, seeds in figures.items()
        },
        "readouts": {readout: _compared(found[readout]) for readout in args.readout},
    }


def _main_figure(readout: str) -> str:
    """Return the name of the figure that stands for a readout."""
    return readout.replace("-", "_") + ("_dice" if readout.endswith("seg") else "_balanced_accuracy")


def _compared(found: dict[str, list[dict[str, np.ndarray]]]) -> dict[str, Any]:
    """Return the scores of one readout by encoder and seed, with intervals over subjects, and the paired differences.

    A subject's score is its accuracy, or its mean Dice over classes: one that is absent is left out where it is not
    predicted, and counts 0 where it is.

    Args:
        found: name -> per seed subject -> (classes,).
    """
    import numpy as np

    from agssd.evaluation.statistics import crossed_mean, paired_difference

    tables = {
        name: np.stack([np.array([np.nanmean(seed[subject]) for subject in sorted(seed)]) for seed in seeds])
        for name, seeds in found.items()
    }
    return {
        "score": {name: crossed_mean(table)._asdict() for name, table in tables.items()},
        "score_by_seed_and_subject": {name: table.tolist() for name, table in tables.items()},
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


def _encoders(args: argparse.Namespace, cache: VolumeCache) -> list[tuple[str, Backbone]]:
    """Return (name, encoder) in the order given, random ones and the slice-wise one last."""
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
    if args.slices is not None:
        found.append((f"slices-{args.slices}", _slice_encoder(args, cache)))
    if not found:
        raise ValueError(
            "nothing to probe: give --encoder [NAME=]PATH, and --random to compare with random weights, or --slices"
        )
    return found


def _slice_encoder(args: argparse.Namespace, cache: VolumeCache) -> Backbone:
    from agssd.data_modules.agreement import cache_contract
    from agssd.models.slices import SliceEncoder, load_slice_model

    if args.weights is None:
        raise ValueError(f"--slices {args.slices} needs --weights PATH, a local file, or --weights random")
    contract = cache_contract(cache.cases)
    if contract["modality"] == "mixed":
        raise ValueError(f"--slices takes caches of one modality, {args.cache} holds CT and MRI")
    low, high = contract["intensity"][contract["modality"]]["range"]
    model = load_slice_model(args.slices, args.weights)
    return SliceEncoder(model, contract["channels"], args.slice_axis, args.slice_patch_vox, (low, high))


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


def _seen(backbone: Backbone, data: ProbeSet) -> dict[str, int] | None:
    """Return how many held-out subjects and copies of scans the encoder was trained on; None where nobody knows."""
    found = data.held_out_overlap((backbone.contract or {}).get("seen"))
    return None if found is None else {"subjects": len(found.subjects), "near_duplicates": len(found.duplicates)}


def _window(given: Sequence[int] | None, backbone: Backbone) -> Size | None:
    from agssd.models.slices import SliceEncoder

    if isinstance(backbone, SliceEncoder):
        return None  # whole slices
    patch = backbone.patch_size
    if given is None:
        return tuple(4 * n for n in patch)
    if len(given) not in (1, len(patch)):
        count = {2: "two", 3: "three"}[len(patch)]
        raise ValueError(f"--window-vox takes one number or {count}, got {list(given)}")
    return tuple(given) * len(patch) if len(given) == 1 else tuple(given)


def print_report(report: dict[str, Any]) -> None:
    """Print for each readout one line per encoder and one per pair."""
    by = "train against val" if report["folds"] == "val" else f"{report['folds']} folds"
    print(
        f"\n{report['num_cases']} volumes, measured on {report['num_subjects']} subjects, {by}, "
        f"{report['labelled_subjects_per_fold']} labelled subjects per fold"
    )
    for readout, table in report["readouts"].items():
        segments = readout.endswith("seg")
        print(f"\n{TITLES[readout]}")
        heading = ("Dice", "by class") if segments else ("accuracy", "balanced accuracy, AUROC")
        print(f"{'encoder':<20}{'seeds':>6}{heading[0]:>9}{'95 % interval':>20}   {heading[1]}")
        for name, score in table["score"].items():
            seeds = report["encoders"][name]["figures_by_seed"]
            stem, main = readout.replace("-", "_"), _main_figure(readout)
            keys = [key for key in seeds[0] if key.startswith(stem) and (key != main or not segments)]
            more = " ".join(f"{sum(seed[key] for seed in seeds) / len(seeds):.3f}" for key in keys)
            print(f"{name:<20}{len(seeds):>6}{score['mean']:>9.4f}{_interval(score):>20}   {more}")
        for row in table["differences"]:
            shown = "" if row["low"] > 0 or row["high"] < 0 else "   no difference shown"
            print(f"{row['first']} - {row['second']}: {row['mean']:+.4f} {_interval(row, '+')}{shown}")
    print()
    for name, row in report["encoders"].items():
        for found in row["held_out_seen"][:1]:  # seeds of one method are trained alike; the file holds all
            told = "unknown how many" if found is None else str(found["subjects"])
            copies = (
                f" and of {found['near_duplicates']} further scans a copy" if found and found["near_duplicates"] else ""
            )
            print(
                f"{name} has seen {told} of the {report['num_subjects']} held-out subjects in its own training{copies}"
            )


def _interval(row: dict[str, float], sign: str = "") -> str:
    return f"[{row['low']:{sign}.4f}, {row['high']:{sign}.4f}]"
