"""`agssd check`: all is well where it is, and every failure is made to happen and named with its remedy."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from agssd.cli import main
from agssd.commands.check import checks
from agssd.commands.check.checks import CHECKS
from agssd.commands.check.table import Finding, Place, Told, run_check, run_checks, show
from agssd.lightning_cli import ParsedFit

CONF = Path(__file__).resolve().parents[2] / "conf"
EXPERIMENT = ["--config", str(CONF / "experiment" / "agssd_small.yaml"), "--trainer.accelerator", "cpu"]
FEW = ["--data.global_batch_size", "2", "--data.num_workers", "0"]
BY_NAME = {check.name: check for check in CHECKS}


def place_of(cache: Path, folder: Path, *more: str) -> Place:
    fit = ParsedFit([*EXPERIMENT, *FEW, "--data.cache", str(cache), "--trainer.default_root_dir", str(folder), *more])
    fit.build()
    return Place(fit.settings, fit.run_directory, fit.model, fit.datamodule, torch.device("cpu"))


def ready(cache: Path, folder: Path, *more: str) -> Place:
    place = place_of(cache, folder, *more)
    place.data.setup("validate")
    return place


def fails(check: str, place: Place, problem: str, remedy: str) -> None:
    finding = run_check(BY_NAME[check], place)
    assert problem in finding.problem, finding
    assert remedy in finding.remedy, finding
    table = show({check: finding})
    assert table.startswith("FAIL") and remedy in table


def judged(check: str, *values: Any) -> Finding:
    """Return what a check makes of the values of several ranks, each on a host of its own."""
    return BY_NAME[check].judge([Told(rank, f"host{rank}", value) for rank, value in enumerate(values)])


def test_check__all_is_well_and_nothing_is_left_behind(
    tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["check", *EXPERIMENT, *FEW, "--data.cache", str(tiny_cache), "--trainer.default_root_dir", str(run)]
    code = main(command)
    out = capsys.readouterr().out
    assert code == 0, out
    assert [line.split("  ")[0] for line in out.splitlines()] == ["ok"] * (1 + len(CHECKS)), out
    assert list(tmp_path.iterdir()) == []


def test_check__a_failure_ends_with_1_and_spares_what_rests_on_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["check", *EXPERIMENT, "--data.cache", str(tmp_path / "gone.h5")]
    assert main([*command, "--trainer.default_root_dir", str(tmp_path / "run")]) == 1
    out = capsys.readouterr().out
    assert "FAIL  cache" in out and "does not exist" in out and "remedy: name a cache" in out
    assert "not run" in next(line for line in out.splitlines() if "one step" in line)
    assert "ok    run directory" in out, "what does not rest on the cache is checked all the same"


def test_devices__fewer_than_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    place = place_of(tmp_path / "none.h5", tmp_path, "--trainer.accelerator", "gpu", "--trainer.devices", "4")
    finding = checks.devices(place.settings)
    assert "1 GPU(s) visible, 4 asked for" in finding.problem and "--gpus-per-node" in finding.remedy


def test_devices__launcher_started_another_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("WORLD_SIZE", "3")
    finding = checks.devices(place_of(tmp_path / "none.h5", tmp_path, "--trainer.devices", "2").settings)
    assert "torchrun started 3 process(es)" in finding.problem and "--nproc-per-node" in finding.remedy


def test_devices__srun_with_what_lightning_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = place_of(tmp_path / "none.h5", tmp_path, "--trainer.devices", "2")
    for name, value in {"STEP_ID": "0", "NTASKS": "2", "PROCID": "0", "JOB_NAME": "check"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    finding = checks.devices(place.settings)
    assert "--ntasks" in finding.problem and "--ntasks-per-node" in finding.remedy
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    assert not checks.devices(place.settings).problem


def test_cache__damaged(tiny_cache: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.h5"
    torn.write_bytes(tiny_cache.read_bytes()[:5000])
    fails("cache", place_of(torn, tmp_path), "truncated or damaged", "--data.cache PATH")


def test_cache__not_the_same_on_every_host(tiny_cache: Path, tmp_path: Path, make_cache: Callable[..., Path]) -> None:
    other = make_cache(tmp_path / "other.h5", num_cases=4, seed=99)
    first, second = (BY_NAME["cache"].measure(ready(cache, tmp_path)) for cache in (tiny_cache, other))
    copied = tmp_path / "copy.h5"
    copied.write_bytes(tiny_cache.read_bytes())
    assert BY_NAME["cache"].measure(ready(copied, tmp_path)) == first, "a copy elsewhere is the same cache"
    finding = judged("cache", first, first, second)
    assert "rank 2 on host2 sees another cache" in finding.problem and "copy the cache to host2" in finding.remedy


def test_filters__missing(tiny_cache: Path, tmp_path: Path) -> None:
    import hdf5plugin

    place = ready(tiny_cache, tmp_path)
    assert run_check(BY_NAME["HDF5 filters"], place).problem == ""
    h5py.h5z.unregister_filter(hdf5plugin.BLOSC_ID)
    try:
        fails("HDF5 filters", place, f"no HDF5 filter {hdf5plugin.BLOSC_ID}", "install hdf5plugin")
    finally:
        hdf5plugin.register("blosc", force=True)


def test_run_directory__not_writable(tiny_cache: Path, tmp_path: Path) -> None:
    fails("run directory", place_of(tiny_cache, Path("/proc/agssd")), "", "--trainer.default_root_dir")
    (tmp_path / "file").write_text("")
    fails("run directory", place_of(tiny_cache, tmp_path / "file" / "run"), "is a file", "--trainer.default_root_dir")


def test_run_directory__too_small(tiny_cache: Path, tmp_path: Path) -> None:
    many = ["--checkpoint.keep_last", "-1", "--trainer.max_steps", "1000000000", "--checkpoint.every_n_train_steps"]
    place = place_of(tiny_cache, tmp_path, *many, "1000")
    fails("run directory", place, "1000002 checkpoints of", "lower checkpoint.keep_last")


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ([], 2 + 1 + 1),
        (["--checkpoint.keep_last", "5"], 5 + 1 + 1),
        (["--checkpoint.save_top_k", "7"], 2 + 1 + 1),  # nothing is ranked without a metric
        (["--checkpoint.save_top_k", "7", "--checkpoint.monitor", "val/loss"], 2 + 7 + 1 + 1),
        (["--checkpoint.save_top_k", "-1", "--checkpoint.monitor", "val/loss"], 2 + 40 + 1 + 1),
        (["--checkpoint.keep_last", "-1", "--checkpoint.monitor", "val/loss"], 40 + 1 + 1),
        (["--best_checkpoint.enabled", "false"], 2 + 1),
        (["--collapse_monitor.policy", "rollback"], 2 + 1 + 1 + 1),
        (["--collapse_monitor.policies", '{"uniform": "rollback"}'], 2 + 1 + 1 + 1),
    ],
)
def test_kept_checkpoints__are_those_that_a_run_keeps(tmp_path: Path, settings: list[str], count: int) -> None:
    length = ["--trainer.max_steps", "400", "--checkpoint.every_n_train_steps", "10"]
    fit = ParsedFit([*EXPERIMENT, *FEW, "--data.cache", str(tmp_path / "none.h5"), *length, *settings])
    assert checks.kept_checkpoints(fit.settings) == count


def test_run_directory__too_slow(tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (time.sleep(0.2), real(handle)))
    monkeypatch.setattr(checks, "SECONDS_TO_SAVE", 0.2)
    fails("run directory", place_of(tiny_cache, tmp_path), "a checkpoint of", "faster disk")
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_bytes__is_about_what_a_checkpoint_takes(tiny_cache: Path, tmp_path: Path) -> None:
    place = place_of(tiny_cache, tmp_path)
    optimiser = place.model.configure_optimizers()
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    torch.save({"state_dict": place.model.state_dict(), "optimizer": optimiser.state_dict()}, tmp_path / "x.ckpt")
    assert checks.checkpoint_bytes(place) == pytest.approx((tmp_path / "x.ckpt").stat().st_size, rel=0.05)


def test_handles__too_few(tiny_cache: Path, tmp_path: Path) -> None:
    place = ready(tiny_cache, tmp_path, "--data.num_workers", "64")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        fails("file handles", place, "ulimit -n allows 512", "ulimit -n 4096")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.skipif(not checks.SHARED_MEMORY.is_dir(), reason="no /dev/shm")
def test_shared_memory__too_small(tiny_cache: Path, tmp_path: Path) -> None:
    place = ready(tiny_cache, tmp_path, "--data.num_workers", "8", "--data.global_batch_size", "2")
    assert run_check(BY_NAME["shared memory"], place).problem == ""
    needed, _ = checks.count_shared_memory(place)
    place.data.regions = True
    assert 3 * checks.count_shared_memory(place)[0] == 7 * needed  # 2 bytes of image, 1 of foreground, 4 of regions
    place.data.global_batch_size = 10**8
    fails("shared memory", place, "batches that wait take", "data.num_workers")


def test_shared_memory__ranks_of_a_host_share_it() -> None:
    told = [Told(rank, host, (600, 1000)) for rank, host in enumerate(["a", "b", "b"])]
    assert "b: batches that wait" in checks.judge_shared_memory(told).problem
    assert not checks.judge_shared_memory(told[:2]).problem


def test_clocks__apart(monkeypatch: pytest.MonkeyPatch, tiny_cache: Path, tmp_path: Path) -> None:
    place = place_of(tiny_cache, tmp_path)
    now = checks.read_clock(place)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 90)
    ahead = checks.read_clock(place)
    assert not judged("clocks", now, now + 0.1).problem
    finding = judged("clocks", now, ahead)
    assert "clock of host1 is 90.0 s ahead of that of host0" in finding.problem and "chrony" in finding.remedy


def test_step__not_finite(tiny_cache: Path, tmp_path: Path) -> None:
    place = ready(tiny_cache, tmp_path)
    before = [parameter.clone() for parameter in place.model.parameters()]
    assert run_check(BY_NAME["one step"], place).value.startswith("loss ")
    assert all(torch.equal(a, b) for a, b in zip(before, place.model.parameters(), strict=True))
    with torch.no_grad():
        next(place.model.student["backbone"].parameters()).fill_(float("inf"))
    fails("one step", place, "the loss is nan", "agssd doctor")


def test_all_reduce__wrong_sum() -> None:
    finding = judged("all-reduce", (3.0, 3.0, 1e9), (2.0, 3.0, 1e9))
    assert "rank 1 on host1: the sum over ranks came out as 2 and must be 3" in finding.problem
    assert "leave this host out" in finding.remedy


FAILS = """
import sys
from agssd.cli import main
from agssd.methods.moco_v3 import MoCoV3
def fail(*given): raise RuntimeError("out of memory")
MoCoV3.pretrain_loss = fail
sys.exit(main(sys.argv[1:]))
"""
HANGS = """
import sys, time
from agssd.cli import main
from agssd.data_modules.pretrain import PretrainDataModule
PretrainDataModule.setup = lambda *given: time.sleep(3600)
sys.exit(main(sys.argv[1:]))
"""


def ranks(
    count: int,
    started: Sequence[int],
    command: list[str],
    own: Sequence[list[str]],
    hangs: int | None = None,
    fails: Sequence[int] = (),
) -> list[tuple[int, str]]:
    """Start some of ``count`` ranks as a launcher would, each with options of its own; return codes and output.

    ``hangs`` is a rank that stops when it comes to the cache, and is killed after the others have ended; ``fails`` are
    ranks on which MoCo v3 raises in its loss.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in started:
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0", "GROUP_RANK": "0"}
        environment |= {"LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_RUN_ID": "check", "OMP_NUM_THREADS": "1"}
        program = ["-c", HANGS] if rank == hangs else ["-c", FAILS] if rank in fails else ["-m", "agssd"]
        words = [sys.executable, *program, "check", *command, *own[rank]]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        processes.append(subprocess.Popen(words, env=os.environ | environment, **pipes))
    try:
        outputs = [process.communicate(timeout=300)[0] for rank, process in zip(started, processes, strict=True)
                   if rank != hangs]  # fmt: skip
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for rank, process in zip(started, processes, strict=True) if rank != hangs]
    return list(zip(codes, outputs, strict=True))


def cache_of(*paths: Path) -> list[list[str]]:
    return [["--data.cache", str(path)] for path in paths]


def two_rank_command(folder: Path, *more: str) -> list[str]:
    cluster = ["--config", str(CONF / "cluster" / "ddp2_cpu.yaml")]
    return [*EXPERIMENT, *cluster, *FEW, "--trainer.default_root_dir", str(folder / "run"), *more]


@pytest.mark.slow
@pytest.mark.ddp
def test_check__two_ranks_find_the_same(tiny_cache: Path, tmp_path: Path, make_cache: Callable[..., Path]) -> None:
    (first, table), (second, nothing) = ranks(2, (0, 1), two_rank_command(tmp_path), cache_of(tiny_cache, tiny_cache))
    assert (first, second, nothing) == (0, 0, ""), table
    assert "2 ranks over gloo" in table and "identical on every rank" in table and "finite on all 2" in table
    other = make_cache(tmp_path / "other.h5", num_cases=4, seed=99)
    (first, table), (second, _) = ranks(2, (0, 1), two_rank_command(tmp_path), cache_of(tiny_cache, other))
    assert (first, second) == (1, 1), "every rank knows of a failure on one"
    assert "rank 1" in table and "sees another cache" in table


@pytest.mark.slow
@pytest.mark.ddp
def test_check__a_rank_that_never_comes(tiny_cache: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    ((code, table),) = ranks(2, (0,), two_rank_command(tmp_path, "--timeout", "5"), cache_of(tiny_cache))
    assert code == 1
    assert "FAIL  all-reduce" in table and "did not meet" in table and "GLOO_SOCKET_IFNAME" in table
    assert time.monotonic() - started < 120


@pytest.mark.slow
@pytest.mark.ddp
def test_check__weights_in_parts(tiny_cache: Path, tmp_path: Path) -> None:
    sharded = ["--trainer.strategy", '{"class_path": "agssd.sharding.ShardedStrategy"}']
    command = two_rank_command(tmp_path, *sharded)
    (first, table), (second, _) = ranks(2, (0, 1), command, cache_of(tiny_cache, tiny_cache))
    assert (first, second) == (0, 0), table
    assert "2 ranks over gloo" in table and "finite on all 2" in table


@pytest.mark.slow
@pytest.mark.ddp
def test_check__a_rank_that_fails_in_a_step_is_named_where_the_loss_gathers(tiny_cache: Path, tmp_path: Path) -> None:
    recipe = ["--config", str(CONF / "experiment" / "small.yaml"), "--model", str(CONF / "method" / "moco_v3.yaml")]
    recipe += ["--model.head_hidden", "64", "--trainer.accelerator", "cpu", "--timeout", "60"]
    command = [*recipe, *two_rank_command(tmp_path)[len(EXPERIMENT) :]]
    own = cache_of(tiny_cache, tiny_cache)
    (first, table), (second, _) = ranks(2, (0, 1), command, own, fails=[1])
    assert (first, second) == (1, 1), table
    (failure,) = [line for line in table.splitlines() if line.startswith("FAIL")]
    assert failure.split("  ", 2)[1] == "one step" and f"rank 1 on {socket.gethostname()}: out of memory" in failure
    assert "rank 0" not in failure and "did not answer" not in failure, "the other is well and waits for nobody"


def test_run_check__every_rank_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    errors = ["no room", "", "no room", "another"]
    told = [Told(rank, f"host{rank}", 1.0, error) for rank, error in enumerate(errors)]
    place = Place(None, tmp_path, None, None, None, world_size=4)
    monkeypatch.setattr(place, "gather", lambda value: told)
    finding = run_check(BY_NAME["one step"]._replace(measure=lambda place: 1.0), place)
    assert finding.problem == "rank 0 on host0, rank 2 on host2: no room; rank 3 on host3: another"


@pytest.mark.slow
@pytest.mark.ddp
def test_check__a_run_directory_that_one_rank_cannot_write(tiny_cache: Path, tmp_path: Path) -> None:
    own = [[*options, "--trainer.default_root_dir"] for options in cache_of(tiny_cache, tiny_cache)]
    own[0].append(str(tmp_path / "run"))
    own[1].append("/proc/agssd")
    (first, table), (second, nothing) = ranks(2, (0, 1), two_rank_command(tmp_path), own)
    assert (first, second, nothing) == (1, 1, ""), table
    failure = next(line for line in table.splitlines() if line.startswith("FAIL"))
    assert "run directory" in failure and "rank 1 on" in failure
    assert table.count("FAIL") == 1 and "name a --trainer.default_root_dir" in table


@pytest.mark.slow
@pytest.mark.ddp
def test_check__run_directories_that_are_not_shared(tiny_cache: Path, tmp_path: Path) -> None:
    own = [[*options, "--trainer.default_root_dir"] for options in cache_of(tiny_cache, tiny_cache)]
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        own[rank].append(str(tmp_path / str(rank) / "run"))
    (first, table), (second, _) = ranks(2, (0, 1), two_rank_command(tmp_path), own)
    assert (first, second) == (1, 1), table
    assert "rank 1 on" in table and "another folder than that of rank 0" in table and "that all hosts share" in table
    assert not list(tmp_path.rglob(".agssd-check-*")), "nothing is left behind"


@pytest.mark.slow
@pytest.mark.ddp
def test_check__a_rank_that_hangs_is_named(tiny_cache: Path, tmp_path: Path) -> None:
    command = two_rank_command(tmp_path, "--timeout", "30")
    ((code, table),) = ranks(2, (0, 1), command, cache_of(tiny_cache, tiny_cache), hangs=1)
    assert code == 1, table
    failure = next(line for line in table.splitlines() if line.startswith("FAIL"))
    assert "cache" in failure and f"rank 1 on {socket.gethostname()} did not answer within 30 s" in failure
    assert "see on that host" in table and "ok    all-reduce" in table
    assert "not run" in next(line for line in table.splitlines() if "clocks" in line), "nobody waits a second time"


def test_run_checks__spares_what_rests_on_a_failure(tiny_cache: Path, tmp_path: Path) -> None:
    place = place_of(tmp_path / "gone.h5", tmp_path)
    found = run_checks([BY_NAME["cache"], BY_NAME["HDF5 filters"], BY_NAME["one step"]], place)
    assert found["cache"] is not None and found["HDF5 filters"] is None and found["one step"] is None
