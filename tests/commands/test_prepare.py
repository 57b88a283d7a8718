"""agssd prepare: what is said, what is written, and what is not."""

from __future__ import annotations

import argparse
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from agssd.commands import prepare
from agssd.data_modules import parts
from agssd.data_modules.cache import VolumeCache


def _run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    return prepare.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def many(tmp_path: Path) -> Path:
    folder = tmp_path / "many"
    for seed in range(30):
        _save(folder / f"p{seed:02d}.nii.gz", _head(seed, (24, 26, 22)))
    return folder


def test_prepare__forecast_is_near_what_comes(many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "c.h5"
    assert _run(many, "--out", out) == 0
    text = capsys.readouterr().out
    found = re.search(r"forecast from 4 of 30 scans: ([0-9.]+) MiB, \d+ s, reading [0-9.]+ MiB/s; .* free", text)
    assert found is not None
    actual = out.stat().st_size / 2**20
    assert abs(float(found[1]) - actual) < 0.15 * actual + 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.h5", "many"]
    assert _run(many, "--out", out, "--overwrite", "--no-forecast") == 0
    assert "forecast from" not in capsys.readouterr().out


def test_prepare__disk_that_cannot_hold_the_cache_ends_the_build_before_it_begins(
    many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    out = tmp_path / "c.h5"
    assert _run(many, "--out", out) == 1
    error = capsys.readouterr().err
    assert "choose another --out" in error and "free" in error
    assert [path.name for path in tmp_path.iterdir()] == ["many"]
    assert not (many / ".agssd-salt").exists()
    monkeypatch.undo()
    assert _run(many, "--out", out, "--no-forecast") == 0


def test_prepare__spacing_that_swallows_the_source_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _run("--out", "c.h5", "--spacing-mm", "1.5", "scans")
    assert "'scans' is no number; name SOURCE before --spacing-mm" in capsys.readouterr().err


def _save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return path


def _head(seed: int = 0, shape: tuple[int, int, int] = (24, 26, 22)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    return np.where((grid**2).sum(0) < 0.8, rng.normal(300, 20, shape), np.abs(rng.normal(0, 4, shape))).astype("f4")


def _ct(seed: int = 0) -> np.ndarray:
    return (_head(seed) - 1000 + 800 * (_head(seed) > 100)).astype(np.int16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    scans = tmp_path / "scans"
    for row in range(6):
        _save(scans / f"images/p{row}.nii.gz", _head(row))
        _save(scans / f"labels/p{row}.nii.gz", (_head(row) > 250).astype(np.uint8))
    (scans / "README.md").write_text("about")
    (scans / "table.csv").write_text("a,b")
    return scans


def test_prepare__caches_a_folder_and_says_what_it_did(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c.any-name"
    assert _run(folder, "--out", out, "--labels", "labels/*") == 0
    cache = VolumeCache(out)
    assert len(cache) == 6 and len(cache.select(labelled=True)) == 6
    assert [len(cache.select(split)) for split in ("train", "val", "test")] == [4, 1, 1]
    assert len({case.subject for case in cache.cases}) == 6
    text = capsys.readouterr().out
    assert "modality: 6 scans are mri, because it has no air near -1000 HU: p0.nii.gz" in text
    assert "6 cases, 4 train (4 subjects)" in text and "0 refused, 2 files ignored" in text
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".c*"))


def test_prepare__refuses_by_name_and_goes_on(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "images/broken.nii.gz").write_bytes(b"\x1f\x8b broken")
    _save(folder / "images/zeros.nii", np.zeros((9, 9, 9), dtype=np.uint8))
    (folder / "images/copy.nii.gz").write_bytes((folder / "images/p0.nii.gz").read_bytes())
    out = tmp_path / "c.h5"
    assert _run(folder, "--out", out, "--subject", r"/(p\d|zeros|broken|copy)") == 3
    captured = capsys.readouterr()
    refused = [line for line in captured.out.splitlines() if line.startswith("refused: ")]
    assert len(refused) == 6 + 3
    assert f"refused: {folder / 'images/zeros.nii'}: all voxels are 0" in refused
    assert any(line.startswith(f"refused: {folder / 'images/broken.nii.gz'}: truncated or damaged") for line in refused)
    assert sum("looks like a label map; name label files with --labels" in line for line in refused) == 6
    assert "Traceback" not in captured.out + captured.err
    assert len(VolumeCache(out)) == 6


@pytest.mark.parametrize("error", [RuntimeError("no inverse\nof it"), OSError(5, "Input/output error")], ids=repr)
def test_prepare__an_unexpected_error_costs_one_file(
    error: Exception,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = parts.prepare_case

    def fails_on_p2(paths: tuple[Path, ...], *rest: object) -> object:
        if paths[0].name == "p2.nii.gz":
            raise error
        return real(paths, *rest)

    monkeypatch.setattr(parts, "prepare_case", fails_on_p2)
    assert _run(folder, "--out", tmp_path / "c.h5", "--labels", "labels/*") == 3
    refused = [line for line in capsys.readouterr().out.splitlines() if line.startswith("refused: ")]
    reason = " ".join(str(error).split())
    assert refused == [f"refused: {folder / 'images/p2.nii.gz'}: unexpected {type(error).__name__}: {reason}"]
    assert len(VolumeCache(tmp_path / "c.h5")) == 5


def test_prepare__same_bytes_are_cached_once_even_as_two_persons(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "images/q0.nii.gz").write_bytes((folder / "images/p0.nii.gz").read_bytes())
    assert _run(folder / "images", "--out", tmp_path / "c.h5") == 3
    path = folder / "images"
    assert f"refused: {path / 'q0.nii.gz'}: same bytes as {path / 'p0.nii.gz'}" in capsys.readouterr().out
    assert len(VolumeCache(tmp_path / "c.h5")) == 6


def test_prepare__no_cache_when_all_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _save(tmp_path / "in/zeros.nii", np.zeros((9, 9, 9), dtype=np.uint8))
    out = tmp_path / "c.h5"
    assert _run(tmp_path / "in", "--out", out) == 1
    assert "all 1 scans were refused; no cache was written" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert _run(tmp_path / "empty", "--out", out) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "in"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["zeros.nii"]  # no salt either


def test_prepare__unusable_salt_stops_before_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parts, "prepare_case", lambda *job: pytest.fail("a scan was read"))
    (tmp_path / "salt").write_text("")
    for path, message in ((tmp_path / "salt", "is empty"), (tmp_path / "none/salt", "its folder does not exist")):
        assert _run(folder, "--out", tmp_path / "c.h5", "--salt", path) == 1
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["salt", "scans"]


def test_prepare__one_salt_file_makes_subjects_of_two_caches_comparable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("one", 0), ("two", 1)):
        _save(tmp_path / name / "jane.nii.gz", _head(seed))
        _run(tmp_path / name, "--out", tmp_path / f"{name}.h5")
        _run(tmp_path / name, "--out", tmp_path / f"{name}_joined.h5", "--salt", tmp_path / "salt")
    one, two, *joined = (VolumeCache(tmp_path / f"{name}.h5") for name in ("one", "two", "one_joined", "two_joined"))
    assert one.salt_fingerprint and one.salt_fingerprint != two.salt_fingerprint
    assert joined[0].salt_fingerprint == joined[1].salt_fingerprint != one.salt_fingerprint
    assert one.cases[0].subject != two.cases[0].subject and joined[0].cases[0].subject == joined[1].cases[0].subject
    salt = (tmp_path / "salt").read_bytes().strip()
    assert salt not in (tmp_path / "one_joined.h5").read_bytes()
    assert f"salt: {tmp_path / 'salt'} (created" in capsys.readouterr().out
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    assert "caches to be joined in training need one salt" in " ".join(parser.format_help().split())


def test_prepare__two_modalities_at_two_spacings_are_said_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _save(tmp_path / "scans/ct.nii.gz", _ct())
    _save(tmp_path / "scans/mri.nii.gz", _head(1))
    note = "holds ct at 1.5x1.5x1.5 mm and mri at 1x1x1 mm, and one training takes one spacing: run agssd prepare once"
    for arguments, said in (((), True), (("--spacing-mm", "2"), False), (("--modality", "mri"), False)):
        _run(tmp_path / "scans", "--out", tmp_path / "c.h5", "--overwrite", *arguments)
        assert (note in capsys.readouterr().out) == said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{none}", "--out", "{c}"], "does not exist"),
        (["{folder}", "--out", "{folder}"], "is a folder"),
        (["{folder}", "--out", "{none}/c.h5"], "does not exist; create it first"),
        (["{folder}", "--out", "{c}", "--spacing-mm", "1", "2"], "give one positive number or three"),
        (["{folder}", "--out", "{c}", "--spacing-mm", "0"], "give one positive number or three"),
        (["{folder}", "--out", "{c}", "--workers", "0"], "--workers is 0"),
        (["{folder}", "--out", "{c}", "--subject", "("], "no regular expression"),
    ],
)
def test_prepare__wrong_arguments_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    names = {"none": tmp_path / "none", "folder": folder, "c": tmp_path / "c.h5"}
    assert _run(*(argument.format(**names) for argument in arguments)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "c.h5").exists()


def test_prepare__no_permission_to_write_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)  # the superuser may write anywhere
    assert _run(folder, "--out", tmp_path / "c.h5") == 1
    assert f"no permission to write into {tmp_path}" in capsys.readouterr().err


def test_prepare__existing_output_is_kept_unless_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c.h5"
    assert _run(folder, "--out", out, "--labels", "labels/*") == 0
    before = out.read_bytes()
    assert _run(folder, "--out", out) == 1
    assert "exists; choose another name or pass --overwrite" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert _run(folder, "--out", out, "--labels", "labels/*", "--overwrite") == 0
    assert out.read_bytes() == before


def test_prepare__manifest_with_classes_channels_and_splits(tmp_path: Path) -> None:
    for row in range(3):
        _save(tmp_path / f"a{row}.nii.gz", _head(row))
        _save(tmp_path / f"b{row}.nii.gz", _head(row + 10))
    _save(tmp_path / "ct.nii.gz", _ct())
    (tmp_path / "m.csv").write_text(
        "path,subject,modality,class,split\na0.nii.gz;b0.nii.gz,x,mri,10,train\na1.nii.gz;b1.nii.gz,y,mri,9,val\n"
        "a2.nii.gz;b2.nii.gz,x,,10,train\nct.nii.gz,z,auto,,\n"
    )
    assert _run(tmp_path / "m.csv", "--out", tmp_path / "c.h5", "--spacing-mm", "2", "1", "1.5") == 0
    cache = VolumeCache(tmp_path / "c.h5")
    assert cache.class_names == ("9", "10")
    assert sorted((c.modality, c.channels, c.split, c.class_index) for c in cache.cases) == [
        ("ct", 1, "train", None),
        ("mri", 2, "train", 1),
        ("mri", 2, "train", 1),
        ("mri", 2, "val", 0),
    ]
    assert {case.spacing_mm for case in cache.cases} == {(2.0, 1.0, 1.5)}
    assert len({case.subject for case in cache.cases}) == 3


def test_prepare__one_subject_in_two_splits_stops_before_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.csv").write_text("path,subject,split\na.nii,x,train\nb.nii,x,test\n")
    assert _run(tmp_path / "m.csv", "--out", tmp_path / "c.h5") == 1
    assert "subject 'x' is in test here and in train in line 2" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["m.csv"]


@pytest.mark.slow
def test_prepare__bytes_do_not_depend_on_workers(folder: Path, tmp_path: Path) -> None:
    code = (
        "import argparse, sys\nfrom agssd.commands import prepare\nif __name__ == '__main__':\n"
        "    p = argparse.ArgumentParser(); prepare.add_arguments(p); sys.exit(prepare.run(p.parse_args()))\n"
    )
    (tmp_path / "main.py").write_text(code)
    for workers in ("1", "3"):
        command = [
            sys.executable,
            tmp_path / "main.py",
            folder,
            "--out",
            tmp_path / f"{workers}.h5",
            "--labels",
            "labels/*",
        ]
        done = subprocess.run([*command, "--workers", workers], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "1.h5").read_bytes() == (tmp_path / "3.h5").read_bytes()


def test_prepare__no_name_enters_the_cache(tmp_path: Path) -> None:
    image = nib.Nifti1Image(_head(), np.eye(4))
    image.header["descrip"] = b"Planted^Jane 19770401"
    (tmp_path / "Hospital").mkdir()
    nib.save(image, tmp_path / "Hospital" / "Planted_Jane_4711.nii.gz")
    out, key_map = tmp_path / "c.h5", tmp_path / "keys.csv"
    assert _run(tmp_path / "Hospital", "--out", out, "--key-map", key_map) == 0
    data = out.read_bytes()
    for name in (b"Planted", b"Jane", b"4711", b"1977", b"Hospital", str(tmp_path).encode()):
        assert name not in data
    key = VolumeCache(out).cases[0].key
    assert f"{key},Planted_Jane_4711," in key_map.read_text()


def test_prepare__top_level_imports_only_the_standard_library() -> None:
    heavy = "[name for name in ('torch', 'numpy', 'h5py') if name in sys.modules]"
    code = f"import sys, agssd.commands.prepare, agssd.commands.inspect; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kept", "code"), [("odd", 36, 3), ("ultrasound", 1, 3), ("ct_full", 4, 3)])
def test_prepare__shared_sets_are_cached_or_refused_by_name(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kept: int, code: int
) -> None:
    globs = {"odd": "*_label.nrrd", "ct_full": "*_seg.nii.gz"}.get(name, "nothing")
    assert _run(shared_data / name, "--out", tmp_path / "c.h5", "--labels", globs, "--spacing-mm", 4) == code
    captured = capsys.readouterr()
    cached = len(VolumeCache(tmp_path / "c.h5"))
    assert cached == kept
    assert "Traceback" not in captured.out + captured.err
    for line in captured.out.splitlines():
        if line.startswith("refused: "):
            path, reason = line[len("refused: ") :].split(": ", 1)
            assert Path(path).exists() and len(reason) > 8


def test_prepare__module_offers_what_the_command_line_needs() -> None:
    for name in ("prepare", "inspect"):
        module = importlib.import_module(f"agssd.commands.{name}")
        assert module.__doc__ and len(module.__doc__.strip().splitlines()) == 1
        module.add_arguments(argparse.ArgumentParser())
