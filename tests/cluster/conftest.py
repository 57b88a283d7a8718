"""The undisturbed run that others are held to, and a SLURM of one node."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from paced_runs import Runs, lacking

from agssd.commands._slurm_of_one_machine import OneMachine, missing


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., Path]) -> Runs:
    """Return the experiment, with the run ``undisturbed`` done."""
    folder = tmp_path_factory.mktemp("my runs 50%")
    made = Runs(folder, make_cache(folder / "tiny.h5", 4, (24, 24, 24), splits=["train"] * 4))
    done = made.start(made.plain("undisturbed"))
    said, _ = done.communicate(timeout=600)
    assert done.returncode == 0, said[-3000:]
    return made


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneMachine]:
    """Return a running cluster of this machine."""
    if missing():
        lacking(f"no SLURM on this machine ({missing()}): apt-get install slurmctld slurmd slurm-client munge")
    cluster = OneMachine(tmp_path_factory.mktemp("slurm") / "cluster")
    try:
        try:
            cluster.start()
        except RuntimeError as error:
            lacking(f"SLURM is installed but does not start on this machine: {error}")
        yield cluster
    finally:
        cluster.stop()
