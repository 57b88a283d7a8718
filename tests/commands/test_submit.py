"""The batch script says what the configuration says, survives odd names, and refuses what would lose a run."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import pytest

from agssd.commands import submit


def arguments(*line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    submit.add_arguments(parser)
    args, args.of_fit = parser.parse_known_args(["--config", "a.yaml", "--cluster", "c.yaml", *line])
    return args


def script(*line: str, directory: str = "/runs/ct", **trainer: Any) -> dict[str, str]:
    """Return the flags of the script by name, its last line as ``run``."""
    settings: dict[str, Any] = {"devices": 4, "num_nodes": 2, "accelerator": "gpu", **trainer}
    text = submit.batch_script(["--data.cache", "my ct.h5"], settings, 8, Path(directory), arguments(*line))
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    flags = [shlex.split(each.removeprefix("#SBATCH "))[0] for each in lines if each.startswith("#SBATCH ")]
    return {flag[2:].partition("=")[0]: flag.partition("=")[2] for flag in flags} | {"run": lines[-1]}


def test_script__has_a_task_per_device_and_everything_that_requeueing_needs() -> None:
    flags = script("--time", "1-00:00:00", "--partition", "gpu", "--sbatch", "exclusive", "--sbatch=--comment=x y")
    wanted = {"nodes": "2", "ntasks-per-node": "4", "gpus-per-node": "4", "cpus-per-task": "9", "signal": "USR1@90"}
    wanted |= {"requeue": "", "open-mode": "append", "output": "/runs/ct/slurm-%j.log", "time": "1-00:00:00"}
    wanted |= {"partition": "gpu", "exclusive": "", "comment": "x y"}
    assert wanted.items() <= flags.items()
    words = shlex.split(flags["run"])
    assert words[:2] == ["exec", "srun"] and words[-3:] == ["fit", "--data.cache", "my ct.h5"]
    assert "gpus-per-node" not in script(accelerator="cpu") and "gpus-per-node" not in script("--gres", "gpu:a100:4")
    assert script("--signal-seconds", "300")["signal"] == "USR1@300"


def test_script__names_that_sbatch_would_read_otherwise_are_quoted_or_refused() -> None:
    assert script(directory="/my runs/50%")["output"] == "/my runs/50%%/slurm-%j.log"
    with pytest.raises(ValueError, match="quotes, backslashes and line ends"):
        script(directory='/runs/"a"')


@pytest.mark.parametrize(
    ("flag", "remedy"),
    [("array=0-3", "submit each run by itself"), ("--signal=TERM@5", "--signal-seconds"), ("nodes=3", "num_nodes")],
)
def test_script__flags_that_would_break_the_run_are_refused(flag: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        script(f"--sbatch={flag}")


@pytest.mark.parametrize("devices", ["auto", -1, 0, "0,1"])
def test_script__devices_must_be_a_number(devices: Any) -> None:
    with pytest.raises(ValueError, match="needs the number of devices"):
        script(devices=devices)


def test_arguments__what_is_not_ours_goes_to_fit_in_its_order() -> None:
    args = arguments("--time", "60", "--data.cache", "x.h5", "--model", "m.yaml", "--trainer.max_steps=5")
    assert args.of_fit == ["--data.cache", "x.h5", "--model", "m.yaml", "--trainer.max_steps=5"] and args.time == "60"
