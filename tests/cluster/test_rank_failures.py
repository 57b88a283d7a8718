"""``agssd fit`` on two ranks, from outside: whatever is done to one of them, the job ends in time and says why."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from paced_runs import STEPS, Runs

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

STALLED_S, LOST_S, GRACE_S, BEAT_S = 20, 10, 3, 0.5
KILL_S = 30  # what torchrun gives a process that it has told to end
MACHINE_S = 60  # to end processes on a machine that is busy
START_S = 400
WATCHDOG = [f"--watchdog.{name}={value}" for name, value in (
    ("stalled_s", STALLED_S), ("lost_s", LOST_S), ("grace_s", GRACE_S), ("beat_s", BEAT_S)
)]  # fmt: skip
LONG = ["--trainer.max_steps=4000", "--checkpoint.every_n_train_steps=5"]


class Job:
    """A job of two ranks that is under way."""

    def __init__(self, runs: Runs, run: str, launcher: str, step_s: float, *more: str, **variables: str) -> None:
        self.runs, self.run, self.folder = runs, run, runs.folder / run
        self.log = runs.folder / f"{run}.log"
        arguments = [*WATCHDOG, *more]
        if launcher == "torchrun":
            command = [*runs.torchrun(run, "--standalone", "--nproc-per-node", "2"), *arguments]
        else:
            command = runs.plain(run, *arguments)
        with self.log.open("w") as file:
            environment = runs.environment(step_s) | variables
            self.process = runs.start(command, stdout=file, stderr=file, env=environment, start_new_session=True)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def reach(self, step: int) -> None:
        """Return once ``step`` is in the log of the run."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.said[-3000:]
            if self.runs.steps(self.run)[-1:] >= [step]:
                return
            time.sleep(0.2)
        raise AssertionError(f"no step {step}: {self.said[-3000:]}")

    def pid(self, rank: int) -> int:
        """Return the process of a rank."""
        found = [pid for pid in descendants(self.process.pid) if f"LOCAL_RANK={rank}" in variables_of(pid)]
        return min(found) if found or rank else self.process.pid  # Lightning's first rank has started the others

    def end(self, within_s: float) -> int:
        """Return the exit code; no process of the job is left then."""
        began, all_of_it = time.monotonic(), [self.process.pid, *descendants(self.process.pid)]
        code = self.process.wait(START_S)
        while (left := [pid for pid in all_of_it if alive(pid)]) and time.monotonic() - began < within_s:
            time.sleep(0.2)
        assert not left and time.monotonic() - began < within_s, self.said[-3000:]
        return code

    def clear(self) -> None:
        """Kill what a failed test leaves."""
        for pid in [*descendants(self.process.pid), self.process.pid]:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def descendants(pid: int) -> list[int]:
    try:
        children = [int(one) for task in Path(f"/proc/{pid}/task").iterdir() for one in
                    (task / "children").read_text().split()]  # fmt: skip
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [one for child in children for one in (child, *descendants(child))]


def variables_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def job(runs: Runs, request: pytest.FixtureRequest) -> Iterator[Callable[..., Job]]:
    """Return a function that starts a job: job(launcher, step_s, *arguments, **variables)."""
    name = re.sub(r"\W+", "-", request.node.name)
    started: list[Job] = []

    def start(launcher: str, step_s: float, *more: str, **variables: str) -> Job:
        started.append(Job(runs, name, launcher, step_s, *more, **variables))
        return started[-1]

    yield start
    for one in started:
        one.clear()


@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_failure__a_killed_rank_ends_the_job(launcher: str, rank: int, job: Callable[..., Job]) -> None:
    under_way = job(launcher, 0.2, *LONG)
    under_way.reach(3)
    os.kill(under_way.pid(rank), signal.SIGKILL)
    assert under_way.end(LOST_S + GRACE_S + KILL_S + MACHINE_S) != 0
    lost = r"rank 0 .*does not answer any more" if rank == 0 else r"rank 1 (was ended by SIGKILL|.* is gone|.*no sign)"
    cause = rf"{lost}|\[rank: {rank}\] Child process .* code -9|exitcode\s*: -9"  # or the launcher is the first to see
    assert re.search(cause, under_way.said), under_way.said[-4000:]


@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_failure__a_stopped_rank_ends_the_job(launcher: str, rank: int, job: Callable[..., Job]) -> None:
    under_way = job(launcher, 0.2, *LONG)
    under_way.reach(3)
    os.kill(under_way.pid(rank), signal.SIGSTOP)
    assert under_way.end(2 * LOST_S + GRACE_S + KILL_S + MACHINE_S) != 0
    cause = r"rank 0 .*(does not answer any more|no sign of life)" if rank == 0 else r"rank 1 .*gives no sign of life"
    assert re.search(cause, under_way.said), under_way.said[-4000:]


@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_rank_failure__an_endless_step_ends_the_job(launcher: str, job: Callable[..., Job]) -> None:
    under_way = job(launcher, 0.2, *LONG, TOY_ENDLESS="1:4")
    under_way.reach(3)
    assert under_way.end(STALLED_S + GRACE_S + KILL_S + MACHINE_S) != 0
    place = r"no progress for \d+ s; furthest behind: rank 1 \([^;]*step 4, at paced_toy.py:\d+ endless"
    assert re.search(place, under_way.said), under_way.said[-4000:]


@pytest.mark.parametrize("small_disk", ["1m"], indirect=True)
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_rank_failure__a_full_disk_ends_the_job(launcher: str, small_disk: Path, job: Callable[..., Job]) -> None:
    under_way = job(launcher, 0.2, *LONG, "--checkpoint.dirpath", str(small_disk / "saved"))
    under_way.reach(11)
    with (small_disk / "ballast").open("wb") as file:
        while True:
            try:
                os.write(file.fileno(), bytes(4096))
            except OSError:
                break
    assert under_way.end(GRACE_S + KILL_S + MACHINE_S) != 0
    said = under_way.said
    assert re.search(r"the checkpoint .*step\d+.ckpt could not be written \(.*\); the ones before it are", said), said
    files = sorted(path.name for path in (small_disk / "saved").iterdir())
    assert "last.ckpt" in files and not [name for name in files if name.endswith(".tmp")]


@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_rank_failure__a_cache_that_is_cut_off_ends_the_job(
    launcher: str, runs: Runs, tmp_path: Path, job: Callable[..., Job]
) -> None:
    cache = shutil.copyfile(runs.folder / "tiny.h5", tmp_path / "short.h5")
    under_way = job(launcher, 0.2, *LONG, "--data.init_args.cache", str(cache))
    under_way.reach(3)
    with cache.open("r+b") as file:
        file.truncate(4096)
    assert under_way.end(GRACE_S + KILL_S + MACHINE_S) != 0
    said = under_way.said
    assert "short.h5 has become shorter since it was opened" in said, said[-4000:]
    assert [line for line in said.splitlines() if line.startswith("error: ") and "has become shorter" in line], said


# ------------------------------------------------------- what is no failure


def assert_no_rank_is_accused(said: str) -> None:
    for word in ("watchdog", "no sign of life", "is gone", "because of another", "does not answer", "Traceback"):
        assert word not in said, said[-4000:]


@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_no_failure__a_preempted_run_is_no_lost_rank(launcher: str, runs: Runs, job: Callable[..., Job]) -> None:
    under_way = job(launcher, 0.2, "--trainer.max_steps=4000", "--watchdog.lost_s=2")
    under_way.reach(3)
    os.kill(under_way.pid(1), signal.SIGUSR1)
    code = under_way.end(KILL_S + MACHINE_S)
    assert code == 75 if launcher == "lightning" else code != 0
    assert "the same command goes on" in under_way.said
    if launcher == "lightning":
        assert_no_rank_is_accused(under_way.said)
    assert "ends because of another" not in under_way.said and "agssd watchdog" not in under_way.said
    assert (under_way.folder / "checkpoints/last.ckpt").is_file()


def test_no_failure__a_rank_may_end_long_before_another(runs: Runs, job: Callable[..., Job]) -> None:
    under_way = job("lightning", 0.0, "--watchdog.lost_s=2", TOY_END_S="20")
    assert under_way.process.wait(START_S) == 0, under_way.said[-4000:]
    assert_no_rank_is_accused(under_way.said)
    assert runs.steps(under_way.run)[-1] == STEPS - 1


def test_no_failure__a_run_that_fails_on_every_rank_says_why_and_accuses_none(job: Callable[..., Job]) -> None:
    under_way = job("lightning", 0.0, TOY_RAISE="3")
    code = under_way.process.wait(START_S)
    assert code != 0
    for word in ("agssd watchdog", "no sign of life", "is gone", "does not answer"):
        assert word not in under_way.said, under_way.said[-4000:]
    assert "the toy fails at step 3" in under_way.said
