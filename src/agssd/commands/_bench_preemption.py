"""What an interruption costs: from a signal to the saved run, and on to the first step of the run that goes on."""

from __future__ import annotations

import csv
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agssd.commands._bench_probe import quiet, write_cache
from agssd.commands._bench_rows import Figure
from agssd.commands._slurm_of_one_machine import OneMachine, missing

_STEPS_BEFORE = 3  # of every start, before it is signalled
_PATIENCE_S = 300  # for anything that is waited for
_ONCE = "one process, one run"


def time_preemption(device: Any, folder: Path) -> Iterator[Figure]:
    """Yield the times from a signal to the end of the saved run and to the first step afterwards, also under SLURM.

    DINO at the size of conf/experiment/small.yaml, 16 samples per step, one process, started by ``agssd fit``. SLURM is
    one of this machine alone, started for this; the two minutes that it lets a requeued job wait are not waited for.

    Args:
        device: torch device.
        folder: for the cache of simulated volumes and the runs.

    What a run does not do as it should has no figure and says why.
    """
    config = _write_config(device, folder)
    with quiet():
        write_cache(folder / "preemption.h5")
    yield from _with_agssd_fit(config, folder / "plain")
    yield from _with_slurm(config, folder)


def _write_config(device: Any, folder: Path) -> Path:
    import yaml

    trainer = {"accelerator": "gpu" if device.type == "cuda" else "cpu", "devices": 1, "precision": "bf16-mixed"}
    trainer |= {"max_steps": 100_000, "limit_val_batches": 0, "log_every_n_steps": 1}
    trainer |= {"enable_progress_bar": False, "enable_model_summary": False}
    data = {"cache": str(folder / "preemption.h5"), "parent_vox": [40, 56, 40], "global_batch_size": 16}
    views = {"size_vox": [32, 32, 32], "scale": [0.4, 0.9], "num_local": 0}
    heads = {"num_prototypes": 512, "head_hidden": 512, "head_bottleneck": 128}
    encoder = {"patch_size": 8, "embed_dim": 192, "depth": 4, "num_heads": 3}
    config = {
        "trainer": trainer,
        "model": {"class_path": "agssd.methods.dino.DINO", "init_args": heads},
        "backbone": {"class_path": "agssd.models.vit.ViT", "init_args": encoder},
        "views": {"class_path": "agssd.transforms.crops.OverlapCrops", "init_args": views},
        "data": {
            "class_path": "agssd.data_modules.pretrain.PretrainDataModule",
            "init_args": {**data, "num_workers": 1},
        },
        "online_probe": {"at_start": False, "at_end": False},
        "wandb": {"mode": "disabled"},
    }
    path = folder / "preemption.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _with_agssd_fit(config: Path, directory: Path) -> Iterator[Figure]:
    command = [sys.executable, "-m", "agssd", "fit", "--config", str(config)]
    command += ["--trainer.default_root_dir", str(directory)]
    what, note = "signal to saved run (at most 60 s)", f"agssd fit, step included; {_ONCE}"
    try:
        said, _ = _run_until(command, directory, _STEPS_BEFORE)
        yield Figure(what, _saved_after(said), "s", note)
        what, note = "start of the same command to its first step", f"agssd fit; {_ONCE}"
        _, first_step_s = _run_until(command, directory, _steps(directory) + 1)
        yield Figure(what, first_step_s, "s", note)
    except RuntimeError as error:
        yield Figure(what, None, "s", str(error).partition("\n")[0])


def _run_until(command: list[str], directory: Path, steps: int) -> tuple[str, float]:
    """Start a run, end it by SIGUSR1 once it has logged ``steps`` steps; return its words and the seconds till then."""
    log = directory.with_suffix(".log")
    with log.open("w") as file:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        _wait(lambda: process.poll() is not None or _steps(directory) >= steps, f"step {steps}", log)
        took_s = time.monotonic() - began
        if process.poll() is not None:
            raise RuntimeError(f"the run has ended before step {steps}: {_last_line(log)}")
        process.send_signal(signal.SIGUSR1)
        _wait(lambda: process.poll() is not None, "end after SIGUSR1", log)
    finally:
        process.kill()
        process.wait()
    return log.read_text(), took_s


def _with_slurm(config: Path, folder: Path) -> Iterator[Figure]:
    """Yield the parts of an interruption under SLURM and their sum, or why there are none."""
    whole = "SLURM: signal to first step of requeued job"
    if missing():
        yield Figure(whole, None, "s", f"no SLURM on this machine ({missing()} not found)")
        return
    cluster = OneMachine(folder / "slurm")
    try:
        cluster.start()
        saved_s, queued_s, waits_s, started_s = _requeued(cluster, config, folder / "queued")
    except RuntimeError as error:
        yield Figure(whole, None, "s", str(error).partition("\n")[0])
        return
    finally:
        cluster.stop()
    yield Figure("SLURM: signal to saved run (at most 60 s)", saved_s, "s", f"agssd submit, step included; {_ONCE}")
    yield Figure("SLURM: saved run to job back in the queue", queued_s, "s", _ONCE)
    yield Figure("SLURM: its own wait before it may start again", waits_s, "s", "as it says; not waited for here")
    yield Figure("SLURM: from then to the first step", started_s, "s", f"SLURM's scheduling included; {_ONCE}")
    yield Figure(whole, saved_s + queued_s + started_s, "s", "the above without SLURM's own wait")


def _requeued(cluster: OneMachine, config: Path, directory: Path) -> tuple[float, float, float, float]:
    """Signal a job; return seconds to its save, on to the queue, of SLURM's own wait, and from there to a step.

    Raises:
        RuntimeError: with what did not happen.
    """
    overlay = config.with_name("one_process.yaml")
    overlay.write_text("trainer: {num_nodes: 1}\n")
    command = [sys.executable, "-m", "agssd", "submit", "--config", str(config), "--cluster", str(overlay)]
    command += ["--trainer.default_root_dir", str(directory), "--gres", "none"]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True)
    found = re.match(r"job (\d+), ", done.stdout)
    if found is None:
        raise RuntimeError(f"agssd submit failed: {(done.stderr or done.stdout).strip()}")
    job, log = found[1], directory / f"slurm-{found[1]}.log"

    def wait(until: Callable[[], bool], what: str) -> float:
        def ended() -> bool:
            return cluster.state(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

        _wait(lambda: until() or ended(), what, log)
        now = time.monotonic()
        if not until():
            raise RuntimeError(f"the job has ended before its {what}: {_last_line(log)}")
        return now

    wait(lambda: _steps(directory) >= _STEPS_BEFORE, "first steps")
    began = time.monotonic()
    cluster.call("scancel", "--signal=USR1", job, check=True)
    queued = wait(lambda: cluster.state(job) == "PENDING", "place in the queue")
    saved_s, saved = _saved_after(log.read_text()), _steps(directory)
    waits_s = max(0.0, _may_start(cluster.fields(job)) - time.time())
    cluster.start_now(job)
    allowed = time.monotonic()
    stepped = wait(lambda: _steps(directory) > saved, "first step after the requeue")
    return saved_s, queued - began - saved_s, waits_s, stepped - allowed


def _may_start(fields: dict[str, str]) -> float:
    """Return from when on SLURM may start a job, in seconds as of ``time.time``.

    Raises:
        RuntimeError: if it does not say so.
    """
    told = fields.get("EligibleTime", "")
    try:
        return time.mktime(time.strptime(told, "%Y-%m-%dT%H:%M:%S"))
    except ValueError as error:
        raise RuntimeError(f"SLURM does not say when the job may start: EligibleTime is {told or 'missing'}") from error


def _steps(directory: Path) -> int:
    """Return how many steps a run has logged."""
    path = directory / "metrics.csv"
    if not path.is_file():
        return 0
    with path.open() as file:
        return len({row["step"] for row in csv.DictReader(file) if row.get("train/loss")})


def _saved_after(said: str) -> float:
    found = re.search(r"stopped after step \d+, ([\d.]+) s after the signal", said)
    if found is None:
        last = next((line.strip() for line in reversed(said.split("\n")) if line.strip()), "nothing")
        raise RuntimeError(f"the run did not save itself; the last it said: {last}")
    return float(found[1])


def _wait(until: Callable[[], bool], what: str, log: Path) -> None:
    ends = time.monotonic() + _PATIENCE_S
    while not until():
        if time.monotonic() > ends:
            raise RuntimeError(f"no {what} in {_PATIENCE_S} s: {_last_line(log)}")
        time.sleep(0.02)


def _last_line(log: Path) -> str:
    lines = log.read_text().split("\n") if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "the log is empty")
