"""``agssd fit`` meets a step that is not finite, and ``agssd replay`` says where, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from undisturbed import write_config

from agssd.cli import EXIT_REFUSED, main

RECIPE = """
from agssd.methods.agssd import AGSSD

class Rooted(AGSSD):
    \"\"\"Adds the root of a sum of squares that is 0: finite, but its gradient is not.\"\"\"

    def pretrain_loss(self, views):
        loss = super().pretrain_loss(views)
        weight = self.student["backbone"].blocks[0].fc1.weight
        return loss._replace(total=loss.total + (0 * weight).square().sum().sqrt())
"""


def agssd(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, in ``folder``."""
    import agssd

    paths = [str(folder), str(Path(agssd.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", "agssd", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, cwd=folder)


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def diverged(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the directory and the last words of a run whose first step threw the weights out of range."""
    folder = tmp_path_factory.mktemp("diverged")
    run = folder / "run"
    config = write_config(folder / "config.yaml", tiny_cache)
    done = agssd(
        folder, "fit", "--config", str(config), "--trainer.default_root_dir", str(run),
        "--model.init_args.lr", "1e36", "--model.init_args.warmup", "0", "--trainer.max_steps", "40",
        "--non_finite.max_captures", "1", "--non_finite.max_skipped", "3",
    )  # fmt: skip
    assert done.returncode == EXIT_REFUSED, done.stderr[-3000:]
    return run, done.stderr


def test_fit__stops_with_a_report_that_names_place_and_capture(diverged: tuple[Path, str]) -> None:
    run, said = diverged
    (error,) = errors(said)
    assert "3 in a row (limit non_finite.max_skipped 3)" in error
    (capture,) = (run / "captures").glob("*.pt")
    assert f"agssd replay {capture}" in said
    lines = [json.loads(line) for line in (run / "actions.jsonl").read_text().splitlines()]
    assert [line["action"] for line in lines if line["action"] != "alarm"] == ["skip", "skip", "skip", "stop"]
    assert "first not finite in forward: " in error
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


@pytest.mark.slow
def test_replay__in_a_fresh_process_names_the_layer(diverged: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = diverged
    (capture,) = (run / "captures").glob("*.pt")
    moved = tmp_path / "moved.pt"
    moved.write_bytes(capture.read_bytes())
    done = agssd(tmp_path, "replay", str(moved))
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((run / "actions.jsonl").read_text().splitlines()[0])["finding"]
    assert told["stage"] == "forward" and told["where"].partition(".")[0] in ("student", "teacher")
    again = next(line for line in done.stdout.splitlines() if line.startswith("32-true"))
    assert f"first not finite in forward: {told['where']} (" in again
    assert "from finite inputs" in again and "NaN" in again


@pytest.mark.slow
def test_replay__names_a_gradient_and_imports_foreign_classes_only_if_told(tiny_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "rooted.py").write_text(RECIPE)
    config, run = write_config(tmp_path / "config.yaml", tiny_cache), tmp_path / "run"
    text = config.read_text().replace("agssd.methods.agssd.AGSSD", "rooted.Rooted")
    config.write_text(text)
    done = agssd(
        tmp_path, "fit", "--config", str(config), "--trainer.default_root_dir", str(run),
        "--non_finite.max_captures", "1", "--non_finite.max_skipped", "1",
    )  # fmt: skip
    assert done.returncode == EXIT_REFUSED and len(errors(done.stderr)) == 1, done.stderr[-3000:]
    (capture,) = (run / "captures").glob("*.pt")
    refused = agssd(tmp_path, "replay", str(capture))
    assert refused.returncode == EXIT_REFUSED
    assert errors(refused.stderr) == ["error: the capture names rooted.Rooted; give --trust-class to import it"]
    done = agssd(tmp_path, "replay", str(capture), "--trust-class")
    assert done.returncode == 0, done.stderr[-3000:]
    place = "first not finite in backward: student.backbone.blocks.0.fc1.weight"
    assert [line for line in done.stdout.splitlines() if line.startswith("32-true") and place in line], done.stdout


def test_capture__names_no_patient_and_no_path(diverged: tuple[Path, str], tiny_cache: Path) -> None:
    run, _ = diverged
    (capture,) = (run / "captures").glob("*.pt")
    content = capture.read_bytes()  # an uncompressed archive
    for word in (str(tiny_cache), tiny_cache.name, str(run), "subject0", "case00"):
        assert word.encode() not in content, word
    assert set(torch.load(capture, weights_only=True)["batches"][0]) >= {"image", "sample", "case"}


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("what", ["torn", "empty", "checkpoint", "text", "evil", "missing", "folder"])
def test_replay__refuses_what_is_no_capture_in_one_sentence(
    what: str, diverged: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = diverged
    path, mark = tmp_path / "given.pt", tmp_path / "mark"
    if what == "torn":
        whole = next((run / "captures").glob("*.pt")).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif what == "checkpoint":
        path = run / "checkpoints/last.ckpt"
    elif what == "evil":
        torch.save({"agssd_capture": 1, "state_dict": Evil(mark)}, path)
    elif what == "folder":
        path.mkdir()
    elif what != "missing":
        path.write_text("" if what == "empty" else "no capture")
    assert main(["replay", str(path)]) == EXIT_REFUSED
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"error: {path}") and "\n" not in said, said
    assert not mark.exists()
