"""Write the SLURM batch script of a training and submit it."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

TAKES_FIT = True
# Flags of sbatch that a training needs often; every other goes by --sbatch.
_SBATCH = (
    "account",
    "constraint",
    "cpus-per-task",
    "dependency",
    "exclude",
    "gpus-per-node",
    "gres",
    "job-name",
    "mail-type",
    "mail-user",
    "mem",
    "nodelist",
    "partition",
    "qos",
    "reservation",
    "time",
)
_OURS = ("nodes", "ntasks", "ntasks-per-node", "array", "output", "error", "open-mode", "signal", "requeue", "chdir")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``agssd submit``."""
    parser.usage = (
        "agssd submit --config FILE --cluster FILE [--dry-run] [--time T --partition P ...] [arguments of agssd fit]"
    )
    parser.epilog = (
        "The rest of the line goes to agssd fit. Nodes and tasks follow from trainer.num_nodes and trainer.devices, "
        "one task per device. SBATCH_* variables of the environment count as usual."
    )
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="as of agssd fit; repeatable")
    parser.add_argument("--cluster", required=True, metavar="FILE", help="where it runs: conf/cluster/slurm.yaml")
    parser.add_argument("--dry-run", action="store_true", help="show the script; write and submit nothing")
    parser.add_argument(
        "--signal-seconds",
        type=int,
        default=90,
        metavar="S",
        help="seconds before the time limit at which the run saves itself and is requeued (default: 90)",
    )
    parser.add_argument(
        "--trainer.default_root_dir",
        dest="run_directory",
        metavar="DIR",
        help="the run directory, also of every requeue (default: the configuration's, or runs/EXPERIMENT/TIME)",
    )
    for name in _SBATCH:
        parser.add_argument(f"--{name}", metavar="X", help=f"sbatch --{name}")
    parser.add_argument("--sbatch", action="append", default=[], metavar="FLAG=X", help="any other flag of sbatch")
    parser.set_defaults(of_fit=[])


def run(args: argparse.Namespace) -> int:
    """Submit; return 0, or the exit code of what refused."""
    if shutil.which("sbatch") is None and not args.dry_run:
        raise ValueError("sbatch is not found: submit where SLURM is, or see the script with --dry-run")
    if args.signal_seconds < 1:
        raise ValueError(f"--signal-seconds is {args.signal_seconds}; it must be at least 1")
    configs = [word for file in (*args.config, args.cluster) for word in ("--config", file)]
    named = [] if args.run_directory is None else ["--trainer.default_root_dir", args.run_directory]
    fresh = _new_directory(args.config[0])
    parsed = args.fit(*named, before=configs, new_directory=fresh)
    new, directory = parsed.run_directory == fresh, parsed.run_directory.absolute()
    settings = parsed.settings.as_dict()
    data: dict[str, Any] = (settings.get("data") or {}).get("init_args") or {}

    def script() -> str:
        fit = [*configs, *args.of_fit, "--trainer.default_root_dir", str(directory)]
        return batch_script(fit, settings["trainer"], int(data.get("num_workers") or 0), directory, args)

    if args.dry_run:
        print(script(), end="")
        return 0
    _refuse_missing_cache(data.get("cache") or [])
    script()  # refuses before anything is made
    if new:
        directory = _made(directory)
    return _submit(script(), directory, new)


def _new_directory(config: str) -> Path:
    import time

    from agssd.run.directory import RUNS

    return Path(RUNS) / Path(config).stem / time.strftime("%Y%m%d-%H%M%S")


def _made(directory: Path) -> Path:
    """Make a directory that nobody else has, this one or the first of ``directory-2`` and so on, and return it."""
    candidate, number = directory, 2
    while True:
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            candidate, number = directory.with_name(f"{directory.name}-{number}"), number + 1


def _refuse_missing_cache(caches: str | list[str]) -> None:
    for cache in [caches] if isinstance(caches, str) else caches:
        if not Path(cache).exists():
            raise ValueError(f"data.cache is {cache}, which does not exist; the job would wait in the queue and fail")


def batch_script(
    fit: list[str], trainer: dict[str, Any], num_workers: int, directory: Path, args: argparse.Namespace
) -> str:
    """Return the script: one task per device, signalled before its time is up, requeueable, one log in ``directory``.

    Args:
        fit: arguments of ``agssd fit``.
        trainer: the ``trainer`` group of the configuration.
        num_workers: data workers per task.
        directory: the run directory.
        args: arguments of ``agssd submit``.

    Raises:
        ValueError: for devices that are no number, a flag that this script sets itself, or a path SLURM cannot hold.
    """
    devices: Any = trainer.get("devices")
    nodes = trainer.get("num_nodes") or 1
    if not str(devices).isdigit() or int(devices) < 1:
        raise ValueError(
            f"trainer.devices is {devices!r}; a SLURM job needs the number of devices of a machine, for example "
            "--trainer.devices 4"
        )
    wanted: dict[str, str | None] = {
        "job-name": _name_of_job(directory),
        "dependency": "singleton",  # one job of the name at a time, so one in a run directory
        "nodes": str(nodes),
        "ntasks-per-node": str(devices),
        "cpus-per-task": str(num_workers + 1),
        "output": f"{str(directory).replace('%', '%%')}/slurm-%j.log",
        "open-mode": "append",
        "signal": f"USR1@{args.signal_seconds}",  # to the ranks, not to the shell that waits for them
        "requeue": "",
    }
    if trainer.get("accelerator") in ("gpu", "cuda"):
        wanted["gpus-per-node"] = str(devices)
    wanted |= {name: value for name in _SBATCH if (value := getattr(args, name.replace("-", "_"))) is not None}
    if args.job_name is not None and args.dependency is None:
        wanted.pop("dependency")  # other runs of the user may have that name
    elif args.job_name is None and args.dependency is not None and "?" not in args.dependency:
        wanted["dependency"] = f"{args.dependency},singleton"
    if args.gres is not None and args.gpus_per_node is None:
        wanted.pop("gpus-per-node", None)  # the devices are named otherwise
    for flag in args.sbatch:
        name, equals, value = flag.lstrip("-").partition("=")
        if name in _OURS:
            raise ValueError(f"--sbatch {flag}: {name} is set by agssd submit; {_INSTEAD.get(name, 'leave it out')}")
        wanted[name] = value if equals else ""
    lines = ["#!/bin/bash"]
    for name, value in wanted.items():
        lines.append(f"#SBATCH --{name}" + (f"={_quoted(name, value)}" if value else ""))
    # sbatch's own --cpus-per-task does not reach srun by itself since SLURM 22.05
    step = ["srun", "--kill-on-bad-exit=1", f"--cpus-per-task={wanted['cpus-per-task']}"]
    command = [*step, sys.executable, "-m", "agssd", "fit", *fit]
    lines += [f"cd {shlex.quote(os.getcwd())} || exit 1", f"exec {shlex.join(command)}"]
    return "\n".join(lines) + "\n"


_INSTEAD = {
    "nodes": "use --trainer.num_nodes",
    "ntasks": "use --trainer.devices",
    "ntasks-per-node": "use --trainer.devices",
    "array": "all its tasks would write one run; submit each run by itself",
    "signal": "use --signal-seconds",
}


def _name_of_job(directory: Path) -> str:
    """Return a name that no other run directory of the user has."""
    return f"agssd-{directory.parent.name}-{directory.name}-{zlib.crc32(os.fsencode(directory)):08x}"


def _quoted(name: str, value: str | None) -> str:
    text = str(value)
    if any(character in text for character in "\n\"'\\"):
        raise ValueError(f"{name} is {text!r}; quotes, backslashes and line ends cannot stand in a line of #SBATCH")
    return f'"{text}"' if any(character.isspace() or character == "#" for character in text) else text


def _submit(script: str, directory: Path, new: bool) -> int:
    from agssd.run.directory import unused

    directory.mkdir(parents=True, exist_ok=True)
    path = unused(directory / "submit.sh")
    path.write_text(script)
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode:
        path.unlink()
        if new:
            directory.rmdir()
        raise ValueError(f"sbatch refuses {directory.name}: {(done.stderr or done.stdout).strip()}")
    job = done.stdout.strip().partition(";")[0]
    where = shlex.quote(str(directory))
    print(f"job {job}, run directory {directory}\n")
    for command, what in (
        (f"squeue --job {job}", "its state and start"),
        (f"tail -F {where}/slurm-{job}.log", "what it says"),
        (f"scancel --signal=USR1 {job}", "save at the next step and queue again"),
        (f"scancel {job}", "save at the next step and end"),
    ):
        print(f"  {command}\n      {what}")
    print(f"\nA job that has ended, by failure or by its user, goes on with: sbatch {shlex.quote(str(path))}")
    return 0
