"""Write the encoder of a run as safetensors with its preprocessing contract."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``agssd export``."""
    parser.add_argument(
        "run", metavar="RUN", help="directory of a run (its newest checkpoint is taken) or a .ckpt file"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="directory for backbone.safetensors and .json")
    parser.add_argument(
        "--trust-class", action="store_true", help="import a backbone class outside agssd that the checkpoint names"
    )
    parser.add_argument(
        "--without-record",
        action="store_true",
        help="leave out the digests of subjects and scans that it was trained on: who has such a scan could tell from "
        "them that it was used, and without them nobody can be warned of leakage",
    )


def run(args: argparse.Namespace) -> int:
    """Export the encoder and print where it went; 1 with the reason on stderr if that fails."""
    from agssd.hub import export_backbone, load_backbone

    try:
        checkpoint = find_checkpoint(Path(args.run))
        contract = {"seen": None} if args.without_record else None
        target = export_backbone(checkpoint, args.out, contract=contract, trust_class=args.trust_class)
        contract = load_backbone(target, trust_class=args.trust_class).contract or {}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"checkpoint  {checkpoint} (step {contract['step']}, {contract['method']})")
    print(f"encoder     {target}")
    for name in ("channels", "patch_size", "spacing_mm", "orientation", "modality", "intensity"):
        value = contract[name]
        print(f"{name:<12}{'unknown: the run did not record it' if value is None else value}")
    seen = contract.get("seen")
    told = f"{seen['num_cases']} cases of {seen['num_subjects']} subjects" if seen else "unknown: no record"
    print(f"{'trained on':<12}{told}")
    print(f'load with   agssd.load_backbone("{target}")')
    return 0


def find_checkpoint(run_path: Path) -> Path:
    """Return ``run_path`` if it is a file, else the newest checkpoint below it.

    The newest ``last.ckpt`` wins; without one the highest step in a file name (``step00000500``, ``step=500``), then
    the latest written.

    Raises:
        ValueError: if there is none.
    """
    if run_path.is_file():
        return run_path
    if not run_path.is_dir():
        raise ValueError(f"{run_path}: no such run directory or checkpoint")
    files = [path for path in run_path.rglob("*.ckpt") if path.is_file()]
    if not files:
        raise ValueError(f"{run_path}: holds no checkpoint (*.ckpt); did the run end before its first one?")
    last = [path for path in files if re.fullmatch(r"last(-v\d+)?\.ckpt", path.name)]
    if last:
        return max(last, key=lambda path: path.stat().st_mtime_ns)

    def age(path: Path) -> tuple[int, int]:
        step = re.search(r"step=?(\d+)", path.name)
        return (int(step[1]) if step else -1, path.stat().st_mtime_ns)

    return max(files, key=age)
