"""A rank that dies, hangs, fails or is cut off from disk or cache ends both ranks in time, and the cause is named."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest

from agssd.callbacks.watchdog import EXIT_STALLED, Watchdog, _Watch
from agssd.run.state import read_state

pytestmark = pytest.mark.ddp
LIMIT_S = 240  # for a machine that is slow to start two processes
LOADED_S = 15  # what a loaded machine may need beyond what the watchdog states
# The settings of one_goes_wrong.py, and what the watchdog states for them, in seconds: rank 0 looks up to two beats
# later, the others follow within two more, grace_s and 5 s.
STALLED_S, LOST_S, GRACE_S, BEAT_S = 8, 3, 2, 0.5
FOLLOWS_S = 2 * BEAT_S + GRACE_S + 5
LOST = LOST_S + 2 * BEAT_S + FOLLOWS_S
STALLED = STALLED_S + 2 * BEAT_S + FOLLOWS_S
FAILED = GRACE_S + 3 * BEAT_S + GRACE_S + 5  # with an exception of its own, which a rank meets in a collective
WITHOUT_RANK_0 = LOST_S + GRACE_S + BEAT_S + 5


def run_two(way: str, limit_s: float, cache: Path, out: Path) -> tuple[int, str]:
    """Return the exit code of the job and what it said; neither process outlives it or its limit."""
    script = Path(__file__).with_name("one_goes_wrong.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    log = out / "log"
    with log.open("w") as file:
        command = [sys.executable, str(script), way, str(cache), str(out)]
        job = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        try:
            code = job.wait(LIMIT_S)
            took_s = time.time() - float((out / "WRONG").read_text())
            assert took_s < limit_s + LOADED_S, f"{took_s:.0f} s: {log.read_text()[-3000:]}"
            assert gone(out), f"a process is left behind: {log.read_text()[-3000:]}"
        finally:
            job.kill()
            for rank in (0, 1):
                end(out / f"PID{rank}")
    return code, log.read_text()


def gone(out: Path) -> bool:
    """Return whether the processes of both ranks end within a few seconds."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        if not any(alive(int((out / f"PID{rank}").read_text())) for rank in (0, 1)):
            return True
        time.sleep(0.2)
    return False


def alive(process: int) -> bool:
    """Return whether a process runs or is stopped."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def end(file: Path) -> None:
    """Kill what is left of a failed test."""
    if file.is_file() and alive(int(file.read_text())):
        os.kill(int(file.read_text()), signal.SIGKILL)


WAYS = [
    pytest.param("kill", LOST, r"rank 1 was ended by SIGKILL", marks=pytest.mark.slow),
    pytest.param(
        "stop",
        LOST,
        r"rank 1 \(.*process \d+\) gives no sign of life for \d+ s; it was last seen .*, step \d",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "hang",
        STALLED,
        r"no progress for \d+ s; furthest behind: rank 1 \(.*\) computing a step, step 4",
        marks=pytest.mark.slow,
    ),
    pytest.param("kill-0", WITHOUT_RANK_0, r"rank 0 .*does not answer any more", marks=pytest.mark.slow),
    pytest.param(
        "stop-0", WITHOUT_RANK_0, r"rank 0 .*(does not answer any more|no sign of life)", marks=pytest.mark.slow
    ),
    pytest.param(
        "raise", FAILED, r"rank 1 \(.*\) failed at step 4: OSError: the network disk went away", marks=pytest.mark.slow
    ),
    pytest.param("cache", FAILED, r"case\d+: cache.h5 has become shorter since it was opened", marks=pytest.mark.slow),
    pytest.param("disk-0", FAILED, r"File too large|could not be written", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("way", "limit_s", "cause"), WAYS)
def test_watchdog__ends_both_ranks_and_names_the_cause(
    way: str, limit_s: float, cause: str, tiny_cache: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache.h5"
    shutil.copyfile(tiny_cache, cache)
    code, said = run_two(way, limit_s, cache, tmp_path)
    assert code != 0
    assert re.search(cause, said), said[-4000:]
    assert not (tmp_path / "states0.pt").exists(), "the job went on to its end"
    if way in ("stop", "hang"):  # of a rank that ends, Lightning's launcher may know first, and it kills the others
        assert_put_down(tmp_path, cause)


def assert_put_down(run: Path, cause: str) -> None:
    """Check that the run directory tells the cause."""
    state = read_state(run)
    actions = (run / "actions.jsonl").read_text()
    assert state is not None and state["state"] == "failed"
    assert re.search(cause, state["reason"]), state
    told = json.loads(actions.splitlines()[-1])
    assert told["action"] == "watchdog" and told["reason"] == state["reason"]


@pytest.mark.slow
def test_watchdog__shows_where_a_hanging_rank_is(tmp_path: Path) -> None:
    script = tmp_path / "hang.py"
    script.write_text(
        "import time, lightning.pytorch as L, torch\n"
        "from agssd.callbacks.life_sign import LifeSign\n"
        "from agssd.callbacks.watchdog import Watchdog\n"
        "class Toy(L.LightningModule):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(2, 2)\n"
        "    def training_step(self, batch, index):\n"
        "        if index == 2:\n"
        "            self.a_disk_that_hangs()\n"
        "        return self.layer(batch).sum()\n"
        "    def a_disk_that_hangs(self):\n"
        "        time.sleep(600)\n"
        "    def configure_optimizers(self):\n"
        "        return torch.optim.SGD(self.parameters(), 0.1)\n"
        "L.Trainer(accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False,\n"
        "          callbacks=[Watchdog(stalled_s=2, lost_s=2, beat_s=0.2), LifeSign()]).fit(\n"
        "    Toy(), torch.utils.data.DataLoader(torch.randn(8, 2)))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=LIMIT_S, cwd=tmp_path)
    assert done.returncode == EXIT_STALLED
    assert "rank 0 of 1 ends the job: no progress for" in done.stderr
    assert_put_down(tmp_path, r"no progress for \d+ s \(computing a step, step 2\)")
    assert "computing a step, step 2" in done.stderr and "in a_disk_that_hangs" in done.stderr


@pytest.mark.parametrize("settings", [{"stalled_s": -1.0}, {"lost_s": 0.0}, {"beat_s": 100.0}])
def test_watchdog__nonsense_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="watchdog"):
        Watchdog(**settings)


def test_watchdog__what_it_leaves_behind_holds_no_message_of_an_exception(tmp_path: Path) -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    watch = _Watch(Watchdog(), trainer)
    watch._put_down("rank 1 (node7, process 12) failed at step 4: OSError: /scans/DOE_JOHN.h5 cannot be read: gone")
    (line,) = (tmp_path / "actions.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"].startswith("rank 1 (node7, process 12) failed at step 4: OSError; its message is")
    assert "DOE" not in line
