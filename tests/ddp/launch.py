"""Starts the ranks of one machine as torch's launcher would, and waits for them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def launch(script: str, out: Path, *arguments: str, ranks: int = 2, timeout: float = 900) -> None:
    """Run a script of this folder as so many ranks over gloo; hold their exit codes to 0.

    Args:
        script: its file name.
        out: folder for the logs.
        arguments: of the script.
        ranks: processes.
        timeout: seconds for all.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(ranks):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        environment |= {"NODE_RANK": "0", "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
        with open(out / f"{rank}.log", "w") as log:
            started.append(subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(codes), "\n".join((out / f"{rank}.log").read_text()[-3000:] for rank in range(ranks))
