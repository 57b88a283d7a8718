"""One experiment of two ranks, started in any way, and what its runs leave."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import yaml

HERE = Path(__file__).parent
STEPS = 16


def lacking(what: str, needs_root: bool = False) -> NoReturn:
    """Skip the test, or fail it where AGSSD_REQUIRE_SLURM=1 says that a cluster can be had, by root or by anybody."""
    if os.environ.get("AGSSD_REQUIRE_SLURM") == "1" and (os.geteuid() == 0 or not needs_root):
        pytest.fail(what)
    pytest.skip(what)


class Runs:
    """The experiment: its arguments, its processes and what they leave."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self.experiment, self.cluster = folder / "toy.yaml", folder / "two ranks.yaml"
        init = {"cache": str(cache), "parent_vox": [16, 16, 16], "global_batch_size": 4, "num_workers": 1}
        trainer = {"max_steps": STEPS, "num_sanity_val_steps": 0, "limit_val_batches": 0, "log_every_n_steps": 1}
        trainer |= {"enable_progress_bar": False, "enable_model_summary": False}
        config = {
            "trainer": trainer,
            "model": {"class_path": "paced_toy.PacedToy"},
            "data": {"class_path": "agssd.data_modules.pretrain.PretrainDataModule", "init_args": init},
            "wandb": {"mode": "disabled"},
        }
        self.experiment.write_text(yaml.safe_dump(config))
        where = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
        self.cluster.write_text(yaml.safe_dump({"trainer": where}))

    def environment(self, step_s: float = 0.0, **more: str) -> dict[str, str]:
        """Return the variables of a process whose steps take ``step_s`` seconds, and ``more`` of them."""
        source = str(HERE.parents[1] / "src")
        paths = os.pathsep.join([str(HERE), source, os.environ.get("PYTHONPATH", "")])
        lean = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        return {**os.environ, **lean, "PYTHONPATH": paths, "TOY_STEP_S": str(step_s), **more}

    def arguments(self, run: str, *more: str) -> list[str]:
        """Return ``fit`` and its arguments for the run of that name."""
        configs = ["--config", str(self.experiment), "--config", str(self.cluster)]
        return ["fit", *configs, "--trainer.default_root_dir", str(self.folder / run), *more]

    def start(self, command: list[str], step_s: float = 0.0, **settings: Any) -> subprocess.Popen[str]:
        """Start ``command``, its output in a pipe."""
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, **{**pipe, "env": self.environment(step_s), "cwd": self.folder, **settings})

    def plain(self, run: str, *more: str) -> list[str]:
        """Return the command of a run whose second rank Lightning starts."""
        return [sys.executable, "-m", "agssd", *self.arguments(run, *more)]

    def torchrun(self, run: str, *flags: str) -> list[str]:
        """Return the command of a run whose ranks torchrun starts."""
        return [sys.executable, "-m", "torch.distributed.run", *flags, "-m", "agssd", *self.arguments(run)]

    def steps(self, run: str) -> list[int]:
        """Return the steps in the log of a run, in its order."""
        path = self.folder / run / "metrics.csv"
        if not path.is_file():
            return []
        with path.open() as file:
            return [int(row["step"]) for row in csv.DictReader(file) if row.get("train/loss")]

    def weights(self, run: str) -> dict[str, torch.Tensor]:
        """Return the state of the module at the end of a run.

        Raises:
            AssertionError: if it has not taken all its steps.
        """
        saved = torch.load(self.folder / run / "checkpoints/last.ckpt", weights_only=True)
        assert saved["global_step"] == STEPS
        state: dict[str, torch.Tensor] = saved["state_dict"]
        return state

    def assert_equal(self, run: str, other: str) -> None:
        """Hold two runs to the same weights, bit by bit, and to one row for every step."""
        first, second = self.weights(run), self.weights(other)
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), name
        assert self.steps(run) == self.steps(other) == list(range(STEPS))


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])
