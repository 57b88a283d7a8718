"""Run a captured training step again and say where it stops being finite."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``agssd replay``."""
    parser.add_argument("capture", metavar="CAPTURE", type=Path, help="DIR/captures/stepN-rankR.pt of a run")
    parser.add_argument("--device", default="cpu", help="torch device, for example cpu or cuda (default: cpu)")
    parser.add_argument(
        "--trust-class", action="store_true", help="import classes outside agssd that the capture names"
    )


def run(args: argparse.Namespace) -> int:
    """Replay the step in its own precision and in float32; 0 if it was replayed, 2 with the reason if not."""
    from agssd.evaluation.finite import first_non_finite

    try:
        capture = read_capture(args.capture)
        module = rebuild(capture, args.device, args.trust_class)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    dtype = dtype_of(capture["precision"])
    samples = [int(n) for batch in capture["batches"] for n in batch["sample"]]
    print(f"capture     {args.capture.name}: {capture['what']} not finite")
    print(
        f"step        {capture['step']} of {capture['total_steps']}, rank {capture['rank']} of {capture['world_size']}"
    )
    print(f"samples     {', '.join(map(str, samples))}")
    if capture["finding"]:
        print(f"then        {in_words(capture['finding'])}")
    passes = [(capture["precision"], dtype)] + ([("float32", None)] if dtype is not None else [])
    for name, precision in passes:
        finding = first_non_finite(module, capture["batches"], capture["random_state"], precision)
        outcome = (
            in_words(finding.plain()) if finding else "finite: this rank and this precision alone do not repeat it"
        )
        print(f"{name:<12}{outcome}")
    return 0


def in_words(finding: dict[str, str]) -> str:
    """Return a finding as a sentence."""
    from agssd.evaluation.finite import Finding

    return str(Finding(**finding))


def dtype_of(precision: str) -> Any:
    """Return the dtype of autocast of one of Lightning's precisions, None for float32."""
    from agssd.callbacks.non_finite import DTYPES

    return DTYPES.get(precision)


def read_capture(path: Path) -> dict[str, Any]:
    """Return a capture, loaded as data only.

    Raises:
        ValueError: if the file is torn, is no capture, or one of another version.
    """
    import torch

    from agssd.callbacks.non_finite import FORMAT

    if not path.is_file():
        raise ValueError(f"{path}: no such capture; a run writes them to DIR/captures")
    try:
        capture = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a capture: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(capture, dict) or capture.get("agssd_capture") != FORMAT:
        raise ValueError(f"{path} is no capture of this version of agssd; a run writes them to DIR/captures")
    return capture


def rebuild(capture: dict[str, Any], device: str, trust_class: bool = False) -> Any:
    """Return the module of a capture with its weights, in the mode and at the share of the run of its step.

    Raises:
        ValueError: for a capture without configuration, classes outside agssd, another version's classes, or a
            device that is not there.
    """
    from jsonargparse import ArgumentParser

    from agssd.devices import check_device
    from agssd.methods.base import PretrainModule

    settings = capture["model"]
    if settings is None:
        raise ValueError("the capture holds no configuration, since its run was not started by agssd fit")
    foreign = sorted(name for name in _classes(settings) if not name.startswith("agssd."))
    if foreign and not trust_class:
        raise ValueError(f"the capture names {', '.join(foreign)}; give --trust-class to import it")
    place = check_device(device)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PretrainModule, "model")
    try:
        module = parser.instantiate(parser.parse_object({"model": settings})).model
        module.load_state_dict(capture["state_dict"])
    except (argparse.ArgumentError, ImportError, RuntimeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"the capture does not fit the classes of this version of agssd: {said}") from error
    module.eased |= capture["eased"]
    module.fixed_progress = capture["step"] / capture["total_steps"]
    if capture["mask_ratio"] is not None:
        module.mask_ratio = tuple(capture["mask_ratio"])
    return module.to(place).train()


def _classes(settings: Any) -> set[str]:
    """Return every class path in nested settings."""
    if isinstance(settings, dict):
        own = {settings["class_path"]} if isinstance(settings.get("class_path"), str) else set()
        return own.union(*(_classes(value) for value in settings.values()))
    if isinstance(settings, list):
        return set().union(*map(_classes, settings))
    return set()
