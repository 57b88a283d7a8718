"""Check devices, network, cache, disk and one step on every rank before a run; agssd check --config X as for fit.

Runs as ``fit`` would: alone, under torchrun or under srun, with the same command line. Nothing is left behind.
"""

from __future__ import annotations

import argparse
import logging
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agssd.commands import Fit
    from agssd.commands.check.table import Finding

TAKES_FIT = True
_MEETING = "all-reduce"  # the row in which ranks that never met are told


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``agssd check``."""
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for a rank (default: 60)")


def run(arguments: argparse.Namespace) -> int:
    """Print the table on rank 0 and return 0, or 1 if a check failed.

    Raises:
        ValueError: for a timeout of 0 or less.
    """
    if arguments.timeout <= 0:
        raise ValueError(f"--timeout is {arguments.timeout}; give a number of seconds above 0")
    from agssd.commands.check.checks import devices

    fit: Fit = arguments.fit()
    first = devices(fit.settings)
    if first.problem:  # each rank that lacks a device says so: the others will never meet it
        return _report({"devices": first}, 0)
    fit.build()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    strategy: Any = fit.build_trainer().strategy
    if strategy.launcher is None:
        return _on_this_rank(fit, strategy, first, arguments.timeout)
    return int(strategy.launcher.launch(_on_this_rank, fit, strategy, first, arguments.timeout))


def _on_this_rank(fit: Fit, strategy: Any, first: Finding, timeout: float) -> int:
    import torch.distributed as dist

    from agssd.commands.check.checks import CHECKS
    from agssd.commands.check.table import Finding, Place, first_line, run_checks

    found: dict[str, Finding | None] = {"devices": first}
    if hasattr(strategy, "_timeout"):
        strategy._timeout = timedelta(seconds=timeout)  # Lightning takes it with its constructor only
    place = Place(fit.settings, fit.run_directory, fit.model, fit.datamodule, None, timeout=timeout)
    try:
        strategy.connect(fit.model)
        strategy.setup_environment()
        place.device = strategy.root_device
        place.rank, place.world_size = strategy.global_rank, strategy.world_size
        place.connect()
    except Exception as error:
        remedy = next(check.remedy for check in CHECKS if check.name == _MEETING)
        found[_MEETING] = Finding("", f"the ranks did not meet: {first_line(error)}", remedy)
        return _report(found, strategy.global_rank)
    try:
        fit.model.configure_model()  # in parts, if the strategy asks for it
        fit.model.to(place.device).train()
        found |= run_checks(CHECKS, place)
        return _report(found, place.rank)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _report(found: dict[str, Finding | None], rank: int) -> int:
    from agssd.commands.check.table import show

    if rank == 0:
        print(show(found), flush=True)
    return int(any(finding is None or bool(finding.problem) for finding in found.values()))
