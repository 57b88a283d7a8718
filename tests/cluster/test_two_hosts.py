"""Two hosts, as network namespaces joined by one link, train like one; a cut link ends both."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from paced_runs import Runs, free_port, lacking

pytestmark = pytest.mark.ddp

DDP = "lightning.pytorch.strategies.DDPStrategy"
LOST_S, GRACE_S, BEAT_S = 10, 3, 1
LOADED_S = 15  # what a loaded machine may need beyond what the watchdog states
# as the watchdog states them: of the side with rank 0, which looks up to two beats later, and of the side without
ENDS_WITHIN_S = (LOST_S + 2 * BEAT_S + LOADED_S, LOST_S + GRACE_S + BEAT_S + 5 + LOADED_S)


def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Return two namespaces, 10.77.0.1 and 10.77.0.2, joined by ``eth0``; skip where none can be made."""
    names = [f"agssd{os.getpid()}{side}" for side in "ab"]
    if shutil.which("ip") is None:
        lacking("no network namespaces here: apt-get install iproute2")
    try:
        for name in names:
            made = ip("netns", "add", name)
            if made.returncode:
                lacking(f"no network namespaces for this user: {made.stderr.strip()}", needs_root=True)
        made = ip("-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
        if made.returncode:
            lacking(f"no virtual links on this machine: {made.stderr.strip()}", needs_root=True)
        for number, name in enumerate(names, 1):
            assert not ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0").returncode
            for link in ("lo", "eth0"):
                assert not ip("-n", name, "link", "set", link, "up").returncode
        yield names[0], names[1]
    finally:
        for name in names:
            for process in ip("netns", "pids", name).stdout.split():
                os.kill(int(process), signal.SIGKILL)
            ip("netns", "delete", name)


def start(runs: Runs, hosts: tuple[str, str], run: str, step_s: float, *more: str) -> list[subprocess.Popen[str]]:
    """Start one rank on each host."""
    port, ranks = str(free_port()), []
    for number, host in enumerate(hosts):
        flags = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(number)]
        flags += ["--master-addr", "10.77.0.1", "--master-port", port]
        command = runs.torchrun(run, *flags)
        command += ["--trainer.devices", "1", "--trainer.num_nodes", "2"]
        command += more
        environment = {**runs.environment(step_s), "GLOO_SOCKET_IFNAME": "eth0"}
        ranks.append(runs.start(["ip", "netns", "exec", host, *command], env=environment))
    return ranks


@pytest.mark.parametrize("needs_root", [False, True])
@pytest.mark.parametrize("user", [0, 1000])
def test_lacking__fails_where_a_cluster_is_required_and_can_be_had(
    user: int, needs_root: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setenv("AGSSD_REQUIRE_SLURM", "1")
    outcome = pytest.skip.Exception if needs_root and user else pytest.fail.Exception
    with pytest.raises(outcome, match="no namespaces"):
        lacking("no namespaces", needs_root)
    monkeypatch.delenv("AGSSD_REQUIRE_SLURM")
    with pytest.raises(pytest.skip.Exception, match="no namespaces"):
        lacking("no namespaces", needs_root)


def ends_of(rank: subprocess.Popen[str]) -> tuple[str, float]:
    """Wait for a rank and its launcher; return what they said and when they were gone."""
    said, _ = rank.communicate(timeout=300)
    return said, time.monotonic()


def test_two_hosts__reach_the_weights_of_one(runs: Runs, hosts: tuple[str, str]) -> None:
    ranks = start(runs, hosts, "two hosts", 0.0)
    for rank in ranks:
        said, _ = rank.communicate(timeout=600)
        assert rank.returncode == 0, said
    runs.assert_equal("two hosts", "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize(("cut_off", "collective_s"), [(0, 1800), (1, 5)])
def test_two_hosts__cut_link_ends_both_with_the_cause(
    runs: Runs, hosts: tuple[str, str], cut_off: int, collective_s: int
) -> None:
    """Each host tells what it has lost, whether the watchdog or the time-out of a collective sees it first."""
    run = f"host {cut_off} cut off"
    strategy = {"find_unused_parameters": False, "timeout": str(timedelta(seconds=collective_s))}
    more = ["--watchdog.lost_s", str(LOST_S), "--watchdog.grace_s", str(GRACE_S), "--watchdog.beat_s", str(BEAT_S)]
    more += ["--trainer.strategy", json.dumps({"class_path": DDP, "init_args": strategy})]
    ranks = start(runs, hosts, run, 0.3, *more)
    try:
        ends = time.monotonic() + 300
        while len(runs.steps(run)) < 3:
            assert time.monotonic() < ends and all(rank.poll() is None for rank in ranks)
            time.sleep(0.1)
        assert not ip("-n", hosts[cut_off], "link", "set", "eth0", "down").returncode
        cut = time.monotonic()
        with ThreadPoolExecutor() as both:
            ended = list(both.map(ends_of, ranks))
    finally:
        for rank in ranks:
            rank.kill()
    for number, cause in enumerate(
        (r"rank 1 \(.*\) (gives no sign of life|is gone)", "rank 0 or its machine does not")
    ):
        said = ended[number][0]
        assert re.search(f"rank {number} of 2 ends (the job|because of another): {cause}", said), said
    assert all(rank.returncode for rank in ranks)
    for (_, at), limit in zip(ended, ENDS_WITHIN_S, strict=True):
        assert at - cut < limit, [round(each - cut, 1) for _, each in ended]
