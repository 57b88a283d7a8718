"""agssd inspect: a table, or JSON for machines."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from agssd.commands import inspect
from agssd.data_modules.cache import CaseInfo, VolumeCache


def _run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    return inspect.run(parser.parse_args([str(argument) for argument in arguments]))


def test_inspect__lists_every_case(tiny_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(tiny_cache) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 8 + 1
    assert lines[0].split()[:2] == ["key", "shape"]
    for line, case in zip(lines[1:], VolumeCache(tiny_cache).cases, strict=False):
        for word in (case.key, "40x56x40", "1x1x1", "mri", "0 1 2", case.split, case.subject):
            assert word in line
    assert lines[-1] == "8 cases of 8 subjects: 5 train, 2 val, 1 test"


def test_inspect__json_holds_the_whole_index(tiny_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(tiny_cache, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    cache = VolumeCache(tiny_cache)
    assert tuple(CaseInfo.from_json(case) for case in data["cases"]) == cache.cases
    assert data["class_names"] == list(cache.class_names)


def test_inspect__bad_cache_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(tmp_path / "none.h5") == 1
    assert capsys.readouterr().err.startswith("error: cache ")


def test_inspect__draws_cases_with_body_and_label(
    tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import matplotlib.image

    assert _run(tiny_cache, "--draw", tmp_path / "a.png", "--cases", 2) == 0
    shown = capsys.readouterr().err
    cases = VolumeCache(tiny_cache).cases
    assert cases[0].key in shown and cases[-1].key in shown
    assert _run(tiny_cache, "--draw", tmp_path / "b.png", "--cases", 100) == 0
    two, all_cases = (matplotlib.image.imread(tmp_path / name)[..., :3] for name in ("a.png", "b.png"))
    assert all_cases.shape[0] == 4 * two.shape[0]
    colour = two.max(-1) - two.min(-1)
    assert (colour > 0.2).mean() > 0.02  # labels; the rest of the picture is grey
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_inspect__draws_nothing_where_it_cannot(
    tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (("--draw", tmp_path / "a.jpg"), "must end in .png"),
        (("--draw", tmp_path / "a.png", "--cases", 0), "--cases is 0"),
        (("--draw", tmp_path / "none" / "a.png"), "cannot write"),
    ):
        assert _run(tiny_cache, *arguments) == 1
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
