"""Two hosts, as network namespaces joined by one link, train like one; a cut link ends both."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator

import pytest
from paced_runs import Runs, free_port

pytestmark = pytest.mark.ddp

TIMEOUT_S = 15


def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Return two namespaces, 10.77.0.1 and 10.77.0.2, joined by ``eth0``; skip where none can be made."""
    names = [f"agssd{os.getpid()}{side}" for side in "ab"]
    if shutil.which("ip") is None:
        pytest.skip("no network namespaces here: apt-get install iproute2")
    try:
        for name in names:
            made = ip("netns", "add", name)
            if made.returncode:
                pytest.skip(f"no network namespaces for this user: {made.stderr.strip()}")
        made = ip("-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
        if made.returncode:
            pytest.skip(f"no virtual links on this machine: {made.stderr.strip()}")
        for number, name in enumerate(names, 1):
            assert not ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0").returncode
            for link in ("lo", "eth0"):
                assert not ip("-n", name, "link", "set", link, "up").returncode
        yield names[0], names[1]
    finally:
        for name in names:
            ip("netns", "delete", name)


def start(runs: Runs, hosts: tuple[str, str], run: str, step_s: float) -> list[subprocess.Popen[str]]:
    """Start one rank on each host."""
    port, ranks = str(free_port()), []
    for number, host in enumerate(hosts):
        flags = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(number)]
        flags += ["--master-addr", "10.77.0.1", "--master-port", port]
        command = runs.torchrun(run, *flags)
        command += ["--trainer.devices", "1", "--trainer.num_nodes", "2"]
        command += ["--trainer.strategy", "lightning.pytorch.strategies.DDPStrategy"]
        command += ["--trainer.strategy.init_args.timeout", f"0:00:{TIMEOUT_S}"]
        environment = {**runs.environment(step_s), "GLOO_SOCKET_IFNAME": "eth0"}
        ranks.append(runs.start(["ip", "netns", "exec", host, *command], env=environment))
    return ranks


def test_two_hosts__reach_the_weights_of_one(runs: Runs, hosts: tuple[str, str]) -> None:
    ranks = start(runs, hosts, "two hosts", 0.0)
    for rank in ranks:
        said, _ = rank.communicate(timeout=600)
        assert rank.returncode == 0, said
    runs.assert_equal("two hosts", "undisturbed")


@pytest.mark.slow
def test_two_hosts__cut_link_ends_both_with_the_cause(runs: Runs, hosts: tuple[str, str]) -> None:
    ranks = start(runs, hosts, "cut", 0.3)
    ends = time.monotonic() + 200
    while len(runs.steps("cut")) < 3:
        assert time.monotonic() < ends and all(rank.poll() is None for rank in ranks)
        time.sleep(0.1)
    assert not ip("-n", hosts[0], "link", "set", "eth0", "down").returncode
    cut = time.monotonic()
    for rank in ranks:
        said, _ = rank.communicate(timeout=TIMEOUT_S + 90)
        assert rank.returncode != 0
        assert "Timed out" in said or "onnection" in said, said
    print(f"both hosts had ended {time.monotonic() - cut:.1f} s after the link was cut, time-out {TIMEOUT_S} s")
