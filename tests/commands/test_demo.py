from __future__ import annotations

import argparse
import csv
import inspect
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import chromium

import agssd.commands.demo as demo
from agssd.commands.demo import report

CONF = Path(__file__).resolve().parents[2] / "conf"
SIZE = demo.Size({"train": 3, "val": 1, "test": 2}, 4.0, 2, 20, 20)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(words)


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_prepare_folder__refuses_what_it_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="--out"):
        demo._prepare_folder(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_prepare_folder__empties_its_own(tmp_path: Path) -> None:
    out = tmp_path / "new"
    demo._prepare_folder(out)
    (out / "old.png").touch()
    demo._prepare_folder(out)
    assert not (out / "old.png").exists()
    assert (out / "logs").is_dir()


def test_run__failing_command_shows_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "prepare.log"
    with pytest.raises(ValueError, match="agssd prepare.*failed") as caught:
        demo._agssd(log, ["prepare", str(tmp_path / "absent"), "--out", str(tmp_path / "x.h5")])
    assert "absent" in str(caught.value)
    assert "absent" in log.read_text()
    assert "$ agssd prepare" in capsys.readouterr().out


def test_run__foreign_folder_is_refused_with_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").touch()
    assert demo.run(arguments("--out", str(tmp_path))) == 1
    assert "error:" in capsys.readouterr().err


def test_table__holds_means_and_paired_differences(tmp_path: Path) -> None:
    dice = {"random": [(0.5, 0.7), (0.6, 0.6)], "pretrained": [(0.7, 0.9), (0.5, 0.6)]}
    for name, rows in dice.items():
        cases = [{"case": f"c{n}", "dice_class1": a, "dice_class2": b} for n, (a, b) in enumerate(rows)]
        write_csv(tmp_path / name / "test_cases.csv", cases[::-1])
    steps = [{"step": step, "train/loss": 10.0 - step, "train/loss_cls": 1.0, "lr": 0.1} for step in range(20)]
    write_csv(tmp_path / "pretrain" / "metrics.csv", steps)
    results = {name: report.collect(tmp_path / name) for name in dice}
    assert results["random"] == {"grey matter": [0.5, 0.6], "white matter": [0.7, 0.6], "mean": [0.6, 0.6]}
    scores = [
        {"pretrained": {"mean": 0.7}, "random": {"mean": 0.6}},
        {"pretrained": {"mean": 0.5}, "random": {"mean": 0.4}},
    ]
    readouts = dict(zip(("linear-seg", "knn-seg"), ({"score": score} for score in scores), strict=True))
    (tmp_path / "frozen.json").write_text(json.dumps({"readouts": readouts}))
    text = report.write_table(tmp_path / "report.md", results, tmp_path, SIZE, demo.NOTICE, quick=True)
    tokens, _, rest = text.partition("after fine-tuning")
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tokens.splitlines() if line.startswith("| ")]
    assert found[1:] == [["from random weights", "0.600", "0.400"], ["pretrained by AG-SSD", "0.700", "0.500"]]
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in rest.splitlines() if line.startswith("| ")}
    assert [float(cell) for cell in rows["from random weights"]] == [0.55, 0.65, 0.6]
    assert [float(cell) for cell in rows["pretrained by AG-SSD"]] == [0.6, 0.75, 0.675]
    assert [float(cell) for cell in rows["loss"]] == [9.5, -8.5]
    assert "lr" not in rows
    assert "+0.075 on average (-0.050 to +0.200), pretrained better in 1 of 2" in text
    written = (tmp_path / "report.md").read_text()
    assert "simulated" in written and "too short to learn" in written


def content(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


def effective(part: dict[str, Any]) -> dict[str, Any]:
    """Every argument with which a part of a configuration builds its class, stated or default."""
    module, _, name = part["class_path"].rpartition(".")
    parameters = inspect.signature(getattr(import_module(module), name)).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items()}
    return {"class_path": part["class_path"]} | defaults | part.get("init_args", {})


def test_configurations__model_and_encoder_of_agssd_small() -> None:
    folder = Path(demo.__file__).parent
    pretrain, segmentation = content(folder / "pretrain.yaml"), content(folder / "segmentation.yaml")
    assert pretrain["backbone"] == segmentation["backbone"]
    assert effective(pretrain["backbone"]) == effective(content(CONF / "backbone" / "vit_tiny_p8.yaml"))
    assert effective(pretrain["model"]) == effective(content(CONF / "method" / "agssd_small.yaml"))


@pytest.mark.slow
def test_run__quick_form_shows_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nilearn", reason="the template is in nilearn's wheel")
    out = tmp_path / "demo"
    assert demo.run(arguments("--quick", "--out", str(out))) == 0
    printed = capsys.readouterr().out
    assert "simulated" in printed
    assert "pretrained by AG-SSD" in printed and "from random weights" in printed
    pictures = [Path(line.removeprefix("picture: ")) for line in printed.splitlines() if line.startswith("picture: ")]
    assert {path.name for path in pictures} == {"views.png", "segmentation.png"}
    assert all(path.stat().st_size > 10_000 for path in pictures)
    pages = [Path(line.removeprefix("report: ")) for line in printed.splitlines() if line.startswith("report: ")]
    assert {path.name for path in pages} == {"report_pretrain.html", "report_pretrained.html"}
    assert all("Not shown" not in path.read_text() for path in pages)
    with chromium(tmp_path / "profile") as browser:
        for page in pages:
            browser.open(page, 390, scheme="dark")
            browser.wait(
                "[...document.querySelectorAll('figure.chart')].every((figure) => figure.querySelector('svg'))"
            )
            assert browser.run("document.documentElement.scrollWidth") == 390 and not browser.complaints
    assert "Segmentation of 2 held-out subjects from frozen tokens" in printed
    assert (out / "encoder" / "backbone.safetensors").exists()
