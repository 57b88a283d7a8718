"""The work of a bench shared by an array of jobs under a real SLURM."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from made_bench import write_small_bench

from agssd.cli import main
from agssd.commands._slurm_of_one_machine import OneMachine

pytestmark = [pytest.mark.ddp, pytest.mark.slow]


def test_bench__two_arrays_do_all_of_it_and_the_tables_are_of_all(
    slurm: OneMachine, make_cache: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = make_cache(tmp_path / "c.h5", splits=["train"] * 5 + ["val", "test", "test"])
    path, out = write_small_bench(tmp_path / "bench.yaml"), tmp_path / "out"
    words = ["bench", "--config", str(path), "--cache", str(cache), "--out", str(out)]
    share = [sys.executable, "-m", "agssd", *words, "--share", "$SLURM_ARRAY_TASK_ID/3"]
    log = tmp_path / "log-%A_%a.txt"
    array = ["sbatch", "--parsable", "--array=0-2", f"--output={log}", f"--wrap={' '.join(share)}"]
    first = slurm.call(*array, check=True)
    slurm.call(*array, f"--dependency=afterany:{first}", check=True)
    ends = time.monotonic() + 400
    while slurm.call("squeue", "-h"):
        assert time.monotonic() < ends, slurm.call("squeue")
        time.sleep(0.5)
    said = "\n".join(one.read_text() for one in sorted(tmp_path.glob("log-*")))
    assert len(list(tmp_path.glob("log-*"))) == 6 and "Traceback" not in said and "error" not in said, said
    assert not (out / "rows.csv").exists(), "what all shares would write, none writes"
    assert main([*words, "--tables"]) == 0
    with (out / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2, said + capsys.readouterr().err
    assert {row["method"] for row in rows} == {"scratch", "simmim", "simmim-equal-time", "mae"}
