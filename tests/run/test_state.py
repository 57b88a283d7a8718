"""Whether a run lives is told from its process where that can be seen, and from its silence where it cannot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from agssd.run.state import STATE, lives, read_state, refuse_beside_another, this_process, write_state

WRITER = "import json, sys; from agssd.run.state import this_process; print(json.dumps(this_process()), flush=True); "


def started(then: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """Start a process that tells who it is and then does something."""
    process = subprocess.Popen([sys.executable, "-c", WRITER + then], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


def test_state__is_read_as_written_and_holds_no_path(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None
    write_state(tmp_path, {"state": "running", "step": 7, **this_process()})
    state = read_state(tmp_path)
    assert state is not None and state["step"] == 7 and state["pid"] == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] == [STATE]
    assert str(tmp_path) not in (tmp_path / STATE).read_text()


@pytest.mark.parametrize("content", ["", '{"format": 1, "st', "[]", '{"format": 99, "step": 1}', '{"format": 1}'])
def test_state__torn_or_foreign_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / STATE).write_text(content)
    with pytest.raises(ValueError, match=STATE):
        read_state(tmp_path)


def test_lives__process_of_this_machine_is_looked_for_whatever_its_silence() -> None:
    process, told = started("import time; time.sleep(60)")
    try:
        assert lives(told, silent_s=1e6)  # a slow disk, a suspended process: it is there
        assert not lives({**told, "born": told["born"] + 1}, silent_s=0.0)  # its number belongs to another by now
        process.send_signal(signal.SIGKILL)
        limit = time.monotonic() + 60
        while lives(told, silent_s=0.0):  # nobody has waited for it yet: a zombie is dead
            assert time.monotonic() < limit
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


@pytest.mark.parametrize(("every_s", "limit_s"), [(1.0, 120.0), (30.0, 120.0), (60.0, 240.0)])
def test_lives__process_of_another_machine_is_alive_until_silent(every_s: float, limit_s: float) -> None:
    state = {**this_process(), "machine": "another boot/1", "every_s": every_s}
    assert lives(state, limit_s - 1) and not lives(state, limit_s + 1)


def test_lives__without_proc_silence_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agssd.run.state._machine", lambda: None)
    state = {**this_process(), "machine": None, "every_s": 30.0}
    assert lives(state, 60.0) and not lives(state, 600.0)


def test_refuse__another_job_beside_a_living_run_but_not_the_same_one_started_again(tmp_path: Path) -> None:
    refuse_beside_another(tmp_path, "7")  # nothing there
    state = {"step": 7, "slurm_job": "7", "every_s": 30.0, **this_process(), "machine": "another boot/1"}
    write_state(tmp_path, {"state": "running", **state})
    refuse_beside_another(tmp_path, "7")  # SLURM has seen the processes of its first start end
    for job in ("8", None):
        with pytest.raises(ValueError, match="of SLURM job 7 on .*counts as alive for two minutes"):
            refuse_beside_another(tmp_path, job)
    os.utime(tmp_path / STATE, (time.time() - 121, time.time() - 121))
    refuse_beside_another(tmp_path, "8")
    write_state(tmp_path, {"state": "preempted", **state})
    refuse_beside_another(tmp_path, None)
