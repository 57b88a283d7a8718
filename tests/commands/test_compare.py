"""``agssd compare``: only what differs, the step at which curves part, and the same figures as the tables hold."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from agssd.cli import main
from agssd.commands.compare import flat, group_of
from agssd.run import resume_rules

CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "trainer": {"max_steps": 100, "devices": 1, "strategy": "auto", "precision": "32-true"},
    "model": {"class_path": "agssd.methods.agssd.AGSSD", "init_args": {"lr": 0.1, "betas": [0.9, 0.95]}},
    "data": {"class_path": "agssd.data_modules.pretrain.PretrainDataModule", "init_args": {"cache": "a.h5", "seed": 0}},
}


def make_run(directory: Path, curves: dict[str, dict[int, float]], config: dict[str, Any] | None = None) -> Path:
    directory.mkdir(parents=True)
    if config is not None:
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [",".join(["step", *curves])]
    for step in sorted({step for curve in curves.values() for step in curve}):
        lines.append(",".join([str(step), *(repr(c[step]) if step in c else "" for c in curves.values())]))
    (directory / "metrics.csv").write_text("\n".join(lines) + "\n")
    return directory


def compared(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    assert main(["compare", "--json", *map(str, arguments)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_compare__settings_only_where_they_differ_and_the_machine_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copy.deepcopy(CONFIG)
    other["trainer"] |= {
        "devices": 8,
        "accumulate_grad_batches": 4,
        "strategy": {"class_path": "DDP", "init_args": {"timeout": 1}},
    }
    other["model"]["init_args"] |= {"lr": 0.2, "betas": [0.9, 0.99], "extra": None}
    other["data"]["init_args"]["cache"] = "b.h5"
    curve = {"train/loss": {0: 1.0}}
    a, b = make_run(tmp_path / "a", curve, CONFIG), make_run(tmp_path / "b", curve, other)
    settings = compared(capsys, a, b)["settings"]
    assert settings["science"] == {
        "data.cache": ["a.h5", "b.h5"], "model.betas": [[0.9, 0.95], [0.9, 0.99]], "model.extra": ["(none)", None],
        "model.lr": [0.1, 0.2],
    }  # fmt: skip
    assert settings["cut"] == {"trainer.devices": [1, 8], "trainer.accumulate_grad_batches": ["(none)", 4]}
    assert set(settings["machine"]) == {
        "trainer.strategy", "trainer.strategy.class_path", "trainer.strategy.timeout"
    }  # fmt: skip
    assert compared(capsys, a, a)["settings"] == {"science": {}, "cut": {}, "machine": {}}
    assert main(["compare", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    parts = ("model.lr", "cut the batch", "trainer.devices", "settings of the machine", "trainer.strategy")
    assert [out.index(part) for part in parts] == sorted(out.index(part) for part in parts)


def test_compare__of_a_run_with_several_configurations_the_last_counts_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    curve = {"train/loss": {0: 1.0}}
    a, b = make_run(tmp_path / "a", curve, CONFIG), make_run(tmp_path / "b", curve, CONFIG)
    assert compared(capsys, a, b)["notes"] == []
    for number in (2, 9, 10):
        later = copy.deepcopy(CONFIG)
        later["data"]["init_args"]["cache"] = f"b{number}.h5"
        (b / f"config-{number}.yaml").write_text(yaml.safe_dump(later))
    (b / "test.yaml").write_text("model: 3")
    found = compared(capsys, a, b)
    assert found["settings"]["science"] == {"data.cache": ["a.h5", "b10.h5"]}
    (note,) = found["notes"]
    assert note.endswith("ran with 4 configurations, which differ in data.cache; the last, config-10.yaml, counts")
    assert main(["compare", str(a), str(b)]) == 0
    assert note in capsys.readouterr().err


def test_compare__what_a_resume_holds_fixed_is_science() -> None:
    unchanged = [name for name in resume_rules.RESUMED_UNCHANGED if name != "trainer"]
    assert {group_of(name) for name in [*unchanged, "trainer.max_steps", "trainer.precision"]} == {"science"}
    freely = {name for name in resume_rules.RESUMED_FREELY if group_of(name) == "science"}
    assert freely == {"data.on_broken", "data.cache"}  # other samples: without a broken scan, or of another data set


def test_compare__finds_the_first_step_at_which_curves_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for trial in range(5):
        values = {step: float(rng.normal()) for step in range(60)}
        parts = int(rng.integers(1, 59))
        other = {step: float(np.nextafter(v, 9)) if step >= parts else v for step, v in values.items() if step < 59}
        sparse = {step: values[step] for step in range(0, 60, 7)}
        a = make_run(tmp_path / f"{trial}/a", {"train/loss": values, "probe/x": sparse, "throughput/s": {5: 1.0}})
        b = make_run(tmp_path / f"{trial}/b", {"train/loss": other, "probe/x": sparse, "throughput/s": {5: 2.0}})
        found = {one["name"]: one for one in compared(capsys, a, b)["scalars"]}
        loss = found["train/loss"]
        assert loss["parts_at"] == parts and loss["last_common"] == 58 and loss["common_steps"] == 59
        assert loss["values"] == [values[58], other[58]] and loss["final"] == [values[59], other[58]]
        assert loss["lowest"] == [min(values.values()), min(other.values())]
        assert found["probe/x"]["parts_at"] is None and found["throughput/s"]["parts_at"] is None
        assert main(["compare", str(a), str(b / "metrics.csv")]) == 0
        assert f"first part at step {parts}: train/loss" in capsys.readouterr().out


def test_compare__same_curves_say_so_and_nan_equals_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curves = {"train/loss": {0: 1.0, 1: math.nan, 2: math.inf}}
    a, b = make_run(tmp_path / "a", curves, CONFIG), make_run(tmp_path / "b", curves, CONFIG)
    (scalar,) = compared(capsys, a, b)["scalars"]
    assert scalar["parts_at"] is None and scalar["lowest"] == [1.0, 1.0] and scalar["values"] == ["inf", "inf"]
    assert main(["compare", str(a), str(b)]) == 0
    assert "the same at every common step" in capsys.readouterr().out
    c = make_run(tmp_path / "c", {"train/loss": {0: 1.0, 1: 2.0, 2: math.inf}}, CONFIG)
    assert compared(capsys, a, b, c)["scalars"][0]["parts_at"] == 1  # three runs


def test_compare__metric_patterns_and_scalars_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = make_run(tmp_path / "a", {"train/loss": {0: 1.0}, "train/loss_cls": {0: 1.0}, "val/loss": {0: 1.0}})
    b = make_run(tmp_path / "b", {"train/loss": {3: 1.0}, "train/loss_cls": {0: 2.0}, "probe/x": {0: 1.0}})
    found = compared(capsys, a, b, "--metric", "train/*")
    assert [one["name"] for one in found["scalars"]] == ["train/loss", "train/loss_cls"]
    assert found["scalars"][0]["last_common"] is None and found["not_in_all"] == ["probe/x", "val/loss"]
    assert main(["compare", str(a), str(b)]) == 0  # a scalar without a common step breaks no table
    capsys.readouterr()
    assert main(["compare", str(a), str(b), "--metric", "vall/*"]) == 2
    assert "vall/*" in capsys.readouterr().err


def test_compare__draws_the_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curves = {f"train/x{n}": {step: float(step * n) for step in range(9)} for n in range(4)}
    a, b = make_run(tmp_path / "a", curves), make_run(tmp_path / "b", curves)
    out = tmp_path / "compare.png"
    assert main(["compare", str(a), str(b), "--out", str(out)]) == 0
    assert np.asarray(Image.open(out)).std() > 0 and [p.name for p in tmp_path.glob("*.tmp")] == []
    assert main(["compare", str(a), str(b), "--out", "x.pdf"]) == 2


def test_compare__refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = make_run(tmp_path / "a", {"train/loss": {0: 1.0}})
    (tmp_path / "other.csv").write_text("x,y\n1,2\n")
    for arguments, named in (([a], "at least two"), ([a, tmp_path / "b"], "metrics.csv does not exist"),
                             ([a, tmp_path / "other.csv"], "other.csv is no table of metrics")):  # fmt: skip
        assert main(["compare", *map(str, arguments)]) == 2
        assert named in capsys.readouterr().err


def test_compare__imports_no_torch(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", {"train/loss": {0: 1.0}}, CONFIG)
    code = "import sys; from agssd.cli import main; main(['compare', *sys.argv[1:]]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(a), str(a)], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_flat__names_leaves_as_the_command_line_does() -> None:
    assert flat({"a": {"init_args": {"b": [1]}, "class_path": "x"}, "c": {}}) == {
        "a.b": [1],
        "a.class_path": "x",
        "c": {},
    }
