"""Every kind of bad input has its own named reason, and leaves nothing behind.

Each kind is made here, given to ``agssd prepare`` alone and, if it is a bad scan among good ones, in a folder with all
the others. Bad DICOM is in ``test_dicom.py``, bad downloads in ``test_public.py``, slips in manifests in
``test_manifest.py``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from agssd.commands import prepare
from agssd.data_modules.cache import VolumeCache

SHAPE = (14, 16, 12)


def _head(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    return np.where((grid**2).sum(0) < 0.8, rng.normal(300, 20, shape), np.abs(rng.normal(0, 4, shape))).astype("f4")


def _nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None, **header: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, np.eye(4) if affine is None else affine)
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)


def _with(path: Path, change: Callable[[np.ndarray], object]) -> None:
    array = _head()
    change(array)
    _nifti(path, array)


def _patched(path: Path, offset: int, data: bytes) -> None:
    """Write a good NIfTI file and then other bytes into its header."""
    _nifti(path, _head())
    whole = bytearray(path.read_bytes())
    whole[offset : offset + len(data)] = data
    path.write_bytes(whole)


def _rows(path: Path, rows: list[list[float]]) -> None:
    """Write a NIfTI file whose sform has these three rows."""
    _patched(path, 280, struct.pack("<12f", *(value for row in rows for value in row)))
    _bytes = bytearray(path.read_bytes())
    _bytes[252:256] = struct.pack("<2h", 0, 2)  # qform code, sform code
    path.write_bytes(_bytes)


def _cut(path: Path, share: float) -> None:
    _nifti(path, _head())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def _bad_crc(path: Path) -> None:
    """Damage the last voxels, in a file stored without compression: only the checksum shows it."""
    _nifti(path.with_name("plain.nii"), _head())
    data = bytearray(gzip.compress(path.with_name("plain.nii").read_bytes(), compresslevel=0))
    path.with_name("plain.nii").unlink()
    data[-20] ^= 0xFF
    path.write_bytes(data)


def _itk(path: Path, array: np.ndarray, vector: bool = False, **meta: str) -> None:
    image = sitk.GetImageFromArray(array, isVector=vector)
    for key, value in meta.items():
        image.SetMetaData(key, value)
    sitk.WriteImage(image, str(path))


def _itk_cut(path: Path) -> None:
    _itk(path, _head())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _without(path: Path, other: str) -> None:
    _itk(path, _head())
    path.with_name(other).unlink()


def _nrrd_damaged(path: Path, old: bytes, new: bytes) -> None:
    _itk(path, _head())
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


def _pair(folder: Path, keep: str) -> None:
    nib.save(nib.Nifti1Pair(_head(), np.eye(4)), folder / "a.img")
    for name in {"a.img", "a.hdr"} - {keep}:
        (folder / name).unlink()


def _blocks() -> np.ndarray:
    return np.kron(np.arange(8).reshape(2, 2, 2), np.ones((7, 8, 6))).astype(np.uint8)


def _labelled(folder: Path, label: np.ndarray, affine: np.ndarray | None = None) -> None:
    _nifti(folder / "a.nii", _head())
    _nifti(folder / "a_label.nii", label, affine)


def _label_cut(folder: Path) -> None:
    _labelled(folder, _blocks())
    (folder / "a_label.nii").write_bytes((folder / "a_label.nii").read_bytes()[:600])


def _two_labels(folder: Path) -> None:
    _labelled(folder, _blocks())
    _nifti(folder / "a_label2.nii", _blocks() + 1)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _moved(by: float) -> np.ndarray:
    affine = np.eye(4)
    affine[0, 3] = by
    return affine


class Bad(NamedTuple):
    """A bad scan: how it is made in a folder of its own, which file is refused, and the reason, {} = the folder."""

    make: Callable[[Path], object]
    file: str
    reason: str


HEAD = _head()
NAMED = "a.nii"
BAD = {
    # what is no file that can be read to its end
    "empty": Bad(lambda d: (d / NAMED).write_bytes(b""), NAMED, "empty file"),
    "text": Bad(lambda d: (d / NAMED).write_text("no scan " * 99), NAMED, "no NIfTI file: its header does not begin"),
    "header cut": Bad(lambda d: _cut(d / NAMED, 0.02), NAMED, "cut off within its header: 222 bytes"),
    "wrong mark": Bad(lambda d: _patched(d / NAMED, 344, b"xyz\0"), NAMED, "no NIfTI file: its mark is 'xyz', not"),
    "data cut": Bad(lambda d: _cut(d / NAMED, 0.6), NAMED, "truncated or damaged: Expected"),
    "gz cut": Bad(lambda d: _cut(d / "a.nii.gz", 0.6), "a.nii.gz", "truncated or damaged: Compressed file ended"),
    "gz checksum": Bad(lambda d: _bad_crc(d / "a.nii.gz"), "a.nii.gz", "truncated or damaged: CRC check failed"),
    "gz header": Bad(lambda d: (d / "a.nii.gz").write_bytes(b"\x1f\x8b" * 99), "a.nii.gz", "truncated or damaged: Un"),
    "gone link": Bad(lambda d: (d / NAMED).symlink_to("gone"), NAMED, "cannot be opened: No such file"),
    "looping link": Bad(lambda d: _loop(d / NAMED), NAMED, "cannot be opened: Too many levels of symbolic links"),
    "pipe": Bad(lambda d: os.mkfifo(d / NAMED), NAMED, "no regular file"),
    # values
    "nan": Bad(lambda d: _with(d / NAMED, lambda a: a.put(5, np.nan)), NAMED, "1 voxels are NaN"),
    "inf": Bad(lambda d: _with(d / NAMED, lambda a: a.put([5, 9], -np.inf)), NAMED, "2 voxels are infinite"),
    "zeros": Bad(lambda d: _nifti(d / NAMED, HEAD * 0), NAMED, "all voxels are 0"),
    "constant": Bad(lambda d: _nifti(d / NAMED, HEAD * 0 + 7), NAMED, "constant: all voxels are 7"),
    "huge values": Bad(lambda d: _nifti(d / NAMED, HEAD.astype("f8") * 1e40), NAMED, "values from"),
    "labels": Bad(lambda d: _nifti(d / NAMED, _blocks()), NAMED, "looks like a label map; name label files with"),
    "complex": Bad(lambda d: _nifti(d / NAMED, HEAD.astype("c8")), NAMED, "voxels of type complex64 are not read"),
    "RGB": Bad(
        lambda d: _nifti(d / NAMED, np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])),
        NAMED,
        "a colour image",
    ),
    "voxel type": Bad(lambda d: _patched(d / NAMED, 70, b"\x63\0"), NAMED, "no valid NIfTI header: data code 99 not"),
    # shape
    "2D": Bad(lambda d: _nifti(d / NAMED, HEAD[0]), NAMED, "2D image (16x12)"),
    "single slice": Bad(lambda d: _nifti(d / NAMED, HEAD[:1]), NAMED, "single slice (1x16x12)"),
    "4D": Bad(lambda d: _nifti(d / NAMED, np.stack([HEAD] * 3, -1)), NAMED, "4D image (14x16x12x3)"),
    "5D": Bad(lambda d: _nifti(d / NAMED, np.ones((*SHAPE, 1, 2), "f4")), NAMED, "5D image (14x16x12x1x2)"),
    "no voxels": Bad(lambda d: _patched(d / NAMED, 42, b"\0\0"), NAMED, "an empty image of shape 0x16x12"),
    # place in the world
    "sheared": Bad(lambda d: _rows(d / NAMED, [[1, 0.3, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]), NAMED, "sheared affine"),
    "flat": Bad(
        lambda d: _rows(d / NAMED, [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]]),
        NAMED,
        "its affine is degenerate: the axes do not span space",
    ),
    "zero spacing": Bad(
        lambda d: _rows(d / NAMED, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]),
        NAMED,
        "its affine is degenerate: the spacing along axis 3 is 0",
    ),
    "nan affine": Bad(
        lambda d: _rows(d / NAMED, [[np.nan, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]),
        NAMED,
        "its affine has NaN or infinite entries",
    ),
    "tiny spacing": Bad(
        lambda d: _nifti(d / NAMED, HEAD, np.diag([1e-3] * 3 + [1])), NAMED, "its spacing of 0.001 x 0.001 x 0.001 mm"
    ),
    "vast spacing": Bad(
        lambda d: _nifti(d / NAMED, HEAD, np.diag([1, 1, 400, 1])), NAMED, "its spacing of 1 x 1 x 400 mm"
    ),
    "vast field of view": Bad(
        lambda d: _nifti(d / NAMED, _head(0, (90, 9, 9)), np.diag([90, 1, 1, 1])),
        NAMED,
        "its field of view of 8100 x 9 x 9 mm is larger than any body",
    ),
    # other formats
    "Analyze": Bad(lambda d: nib.save(nib.AnalyzeImage(HEAD, None), d / "a.img"), "a.img", "Analyze 7.5 has no orient"),
    "img alone": Bad(lambda d: _pair(d, "a.img"), "a.img", "an .img without its .hdr"),
    "hdr alone": Bad(lambda d: _pair(d, "a.hdr"), "a.hdr", "a NIfTI or Analyze header without its .img"),
    "mhd alone": Bad(
        lambda d: _without(d / "a.mhd", "a.raw"), "a.mhd", "the data file that its header names is missing"
    ),
    "mha cut": Bad(lambda d: _itk_cut(d / "a.mha"), "a.mha", "truncated or damaged: its data end too early"),
    "nrrd cut": Bad(lambda d: _itk_cut(d / "a.nrrd"), "a.nrrd", "truncated or damaged: "),
    "nrrd mark": Bad(lambda d: _nrrd_damaged(d / "a.nrrd", b"NRRD", b"NRRX"), "a.nrrd", "truncated or damaged: "),
    "nrrd sizes": Bad(
        lambda d: _nrrd_damaged(d / "a.nrrd", b"sizes: 12", b"sizes: x2"), "a.nrrd", "truncated or damaged: "
    ),
    "mha mark": Bad(lambda d: (d / "a.mha").write_text("hello"), "a.mha", "truncated or damaged: "),
    "mha 2D": Bad(lambda d: _itk(d / "a.mha", HEAD[0]), "a.mha", "2D image (12x16)"),
    "vectors": Bad(lambda d: _itk(d / "a.nrrd", np.stack([HEAD] * 3, -1), True), "a.nrrd", "3 values per voxel"),
    "frames": Bad(
        lambda d: _itk(d / "a.mha", HEAD, Seq_Frame0000_ProbeToTrackerTransform="1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1"),
        "a.mha",
        "a sequence of tracked 2D frames",
    ),
    "PAR": Bad(lambda d: (d / "a.PAR").write_text("# x"), "a.PAR", "Philips PAR/REC is not read"),
    "MGZ": Bad(lambda d: (d / "a.mgz").write_bytes(b"x"), "a.mgz", "FreeSurfer MGH is not read"),
    "MINC": Bad(lambda d: (d / "a.mnc").write_bytes(b"x"), "a.mnc", "MINC is not read"),
    "GIPL": Bad(lambda d: (d / "a.gipl").write_bytes(b"x"), "a.gipl", "GIPL is not read"),
    # labels
    "label of another shape": Bad(
        lambda d: _labelled(d, _blocks()[1:]), NAMED, "its label {}/a_label.nii has shape 13x16x12, the image has"
    ),
    "label elsewhere": Bad(
        lambda d: _labelled(d, _blocks(), _moved(8)), NAMED, "its label {}/a_label.nii lies up to 8.0 voxels off"
    ),
    "label of fractions": Bad(
        lambda d: _labelled(d, _blocks() * np.float32(0.5)), NAMED, "its label {}/a_label.nii holds values that are no"
    ),
    "label below 0": Bad(
        lambda d: _labelled(d, _blocks().astype("i2") - 1), NAMED, "its label {}/a_label.nii holds values below 0"
    ),
    "label too large": Bad(
        lambda d: _labelled(d, _blocks() * np.int32(9999)), NAMED, "its label {}/a_label.nii holds values above 32767"
    ),
    "label in 4D": Bad(
        lambda d: _labelled(d, np.stack([_blocks()] * 2, -1)), NAMED, "its label {}/a_label.nii: 4D image"
    ),
    "label cut": Bad(_label_cut, NAMED, "its label {}/a_label.nii: truncated or damaged"),
    "label of nothing": Bad(
        lambda d: _nifti(d / "b_label.nii", _blocks()), "b_label.nii", "matches --labels, but no image of its name"
    ),
    # names that say it
    "BIDS field map": Bad(
        lambda d: _nifti(d / "fmap/sub-1_phasediff.nii", HEAD), "fmap/sub-1_phasediff.nii", "a BIDS field map"
    ),
    "BIDS mask": Bad(
        lambda d: _nifti(d / "anat/sub-1_desc-brain_mask.nii", _blocks()),
        "anat/sub-1_desc-brain_mask.nii",
        "a BIDS label map (its name ends in mask)",
    ),
    "BIDS phase": Bad(
        lambda d: _nifti(d / "anat/sub-1_part-phase_T1w.nii", HEAD),
        "anat/sub-1_part-phase_T1w.nii",
        "the phase of a complex image by its BIDS name",
    ),
    "BIDS PET": Bad(lambda d: _nifti(d / "pet/sub-1_pet.nii", HEAD), "pet/sub-1_pet.nii", "a PET scan by its BIDS"),
}


def _run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    return prepare.run(parser.parse_args([str(argument) for argument in arguments]))


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder with its size and time of change, hidden ones too."""
    found = {}
    for path in folder.rglob("*"):
        facts = path.lstat()
        found[str(path)] = (facts.st_size, facts.st_mtime_ns if not path.is_dir() else 0)
    return found


def _refused(text: str) -> dict[str, str]:
    lines = (line.removeprefix("refused: ") for line in text.splitlines() if line.startswith("refused: "))
    return dict(line.split(": ", 1) for line in lines)


@pytest.mark.parametrize("kind", BAD)
def test_prepare__bad_scan_alone_is_named_and_leaves_nothing(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, name, reason = BAD[kind]
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    make(source)
    before = _tree(tmp_path)
    assert _run(source, "--out", out / "c.h5", "--labels", "*_label*") == 1
    captured = capsys.readouterr()
    found = _refused(captured.out)
    assert found[str(source / name)].startswith(reason.replace("{}", str(source))), found
    assert "no cache was written" in captured.err and len(captured.err.strip().splitlines()[-1]) < 200
    assert "Traceback" not in captured.out + captured.err and "unexpected" not in captured.out
    assert _tree(tmp_path) == before


def test_prepare__every_bad_scan_has_its_own_reason_and_costs_no_other_scan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    places = {kind: source / f"kind{row:02d}" for row, kind in enumerate(BAD)}
    for kind, place in places.items():
        place.mkdir(parents=True)
        BAD[kind].make(place)
    _nifti(source / "good.nii.gz", _head(99))
    shutil.copyfile(source / "good.nii.gz", source / "twin.nii.gz")
    (source / "kind00" / "more").mkdir()
    _two_labels(source / "kind00" / "more")
    out = tmp_path / "c.h5"
    assert _run(source, "--out", out, "--labels", "*_label*", "--no-forecast") == 3
    found = _refused(capsys.readouterr().out)
    reasons = {}
    for kind, place in places.items():
        refused = found.pop(str(place / BAD[kind].file))
        reasons[kind] = refused.replace(str(place), "{}")
        assert reasons[kind].startswith(BAD[kind].reason), kind
    assert found.pop(str(source / "twin.nii.gz")) == f"same bytes as {source / 'good.nii.gz'}"
    assert "has a label already (a_label.nii); narrow --labels" in found.pop(str(source / "kind00/more/a_label2.nii"))
    assert found == {}
    assert len(set(reasons.values())) == len(reasons) >= 40, "two kinds share a reason"
    assert len({re.sub(r"[\d.]+", "#", reason) for reason in reasons.values()}) >= len(reasons) - 6
    assert len(VolumeCache(out)) == 2


class Wrong(NamedTuple):
    """Arguments that end the build before it begins: how sources are made, the arguments, and the message."""

    make: Callable[[Path], object]
    arguments: tuple[object, ...]
    message: str


def _dataset(folder: Path, **change: object) -> None:
    for row in (1, 2):
        _nifti(folder / f"set/imagesTr/h{row}.nii.gz", _head(row))
    entries = [{"image": f"imagesTr/h{row}.nii.gz", "subject": "1"} for row in (1, 2)]
    (folder / "set/dataset.json").write_text(json.dumps({"training": entries, **change}))


def _manifest(text: str | bytes) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        for row in (1, 2):
            _nifti(folder / f"h{row}.nii.gz", _head(row))
        (folder / "m.csv").write_bytes(text if isinstance(text, bytes) else text.encode())

    return make


def _nothing(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "notes").mkdir()
    (folder / "notes/README.md").write_text("no scan")


WRONG = {
    "missing source": Wrong(_nothing, ("{}/none",), "source {}/none does not exist"),
    "empty folder": Wrong(_nothing, ("{}/empty",), "{}/empty holds no scans: empty"),
    "folder of other files": Wrong(_nothing, ("{}/notes",), "{}/notes holds no scans: 1 files of other types"),
    "unknown set": Wrong(_nothing, ("msd:Task99_Nose",), "msd:Task99_Nose is neither a file nor a public set"),
    "bad dataset.json": Wrong(
        lambda d: (_dataset(d), (d / "set/dataset.json").write_text("{")), ("{}/set",), "cannot be read as JSON"
    ),
    "dataset.json without image": Wrong(
        lambda d: _dataset(d, training=[{"label": "x"}]), ("{}/set",), "entry 1 of training and test names no image"
    ),
    "subject torn by a suggestion": Wrong(
        lambda d: _dataset(d, suggested_split={"train": ["h1"], "val": ["h2"]}),
        ("{}/set",),
        "its suggested split has subject '1' in train and val",
    ),
    "no split for training": Wrong(
        _manifest("path,split\nh1.nii.gz,val\nh2.nii.gz,test\n"), ("{}/m.csv",), "every case is in split val or test"
    ),
    "manifest of one column too few": Wrong(
        _manifest("path,subject\nh1.nii.gz\n"), ("{}/m.csv",), "line 2, column subject: 1 field where the header has 2"
    ),
    "manifest with a misspelt column": Wrong(
        _manifest("path,lable_path\nh1.nii.gz,\n"), ("{}/m.csv",), "column 'lable_path' is unknown, did you mean"
    ),
    "manifest with tabs": Wrong(_manifest("path\tsplit\nh1.nii.gz\ttrain\n"), ("{}/m.csv",), "are parted by tabs"),
    "manifest in Latin-1": Wrong(_manifest(b"path\nJ\xf6rg.nii\n"), ("{}/m.csv",), "is not UTF-8: byte 0xf6 in line 2"),
    "manifest of a missing file": Wrong(_manifest("path\nh3.nii.gz\n"), ("{}/m.csv",), "h3.nii.gz does not exist"),
    "manifest without rows": Wrong(_manifest("path\n"), ("{}/m.csv",), "has no rows below its header"),
    "subject in two splits": Wrong(
        _manifest("path,subject,split\nh1.nii.gz,p,train\nh2.nii.gz,p,val\n"),
        ("{}/m.csv",),
        "line 3, column split: subject 'p' is in val here and in train in line 2",
    ),
    "manifest as folder": Wrong(lambda d: (d / "m.csv").mkdir(), ("{}/m.csv",), "{}/m.csv holds no scans"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_prepare__wrong_source_is_one_line_and_leaves_nothing(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, arguments, message = WRONG[kind]
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    make(source)
    before = _tree(tmp_path)
    assert _run(*(str(part).replace("{}", str(source)) for part in arguments), "--out", out / "c.h5") == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    told = lines[0] if "no scan to prepare" not in lines[0] else captured.out
    assert len(lines) == 1 and message.replace("{}", str(source)) in told, captured.err
    assert "Traceback" not in captured.out + captured.err
    assert {name: facts for name, facts in _tree(tmp_path).items() if ".agssd-salt" not in name} == before


def _source(folder: Path, name: str, make: Callable[[Path], object]) -> Path:
    make(folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("a.png", lambda p: p.write_bytes(b"\x89PNG\r\n"), "files of type .png are not read"),
        ("scan", lambda p: p.write_bytes(b"no scan"), "files of type without extension are not read"),
        ("a.zip", lambda p: p.write_bytes(b"PK\3\4"), "files of type .zip are not read"),
        ("a.hdr", lambda p: p.write_bytes(b"\0" * 348), "a header; name its .img"),
        (
            "c.h5",
            lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 99),
            "an HDF5 file, such as an agssd cache, is",
        ),
        (
            "cache",
            lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 99),
            "an HDF5 file, such as an agssd cache, is",
        ),
    ],
)
def test_prepare__file_named_as_source_but_no_scan(
    name: str, make: Callable[[Path], object], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _source(tmp_path, name, make)
    assert _run(path, "--out", tmp_path / "out.h5") == 1
    assert _refused(capsys.readouterr().out)[str(path)].startswith(reason)
    assert [item.name for item in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("arguments", "array", "reason"),
    [
        (("--modality", "ct"), HEAD, "are not HU: a CT has negative values"),
        (("--modality", "ct"), np.random.default_rng(0).normal(-990, 5, SHAPE).astype("f4"), "no body found"),
        (("--spacing-mm", "0.005"), _head(0, (30, 30, 30)), "voxels at this spacing are too many"),
        (("--subject", "patient(\\d+)"), HEAD, "does not match --subject"),
        (("--volume", "5"), np.stack([HEAD] * 3, -1), "--volume 5 is none of its 3 volumes"),
    ],
)
def test_prepare__scan_that_the_arguments_forbid(
    arguments: tuple[str, ...],
    array: np.ndarray,
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _nifti(tmp_path / "in/a.nii.gz", array)
    assert _run(tmp_path / "in", "--out", tmp_path / "out.h5", *arguments) == 1
    assert reason in _refused(capsys.readouterr().out)[str(tmp_path / "in/a.nii.gz")]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_prepare__channels_on_different_grids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _nifti(tmp_path / "a.nii", HEAD)
    _nifti(tmp_path / "b.nii", _head(0, (14, 16, 13)))
    _nifti(tmp_path / "c.nii", _head(1), _moved(3))
    for other, reason in (("b", "has shape 14x16x13, the image has 14x16x12"), ("c", "lies up to 3.0 voxels off")):
        (tmp_path / "m.csv").write_text(f"path\na.nii;{other}.nii\n")
        assert _run(tmp_path / "m.csv", "--out", tmp_path / "out.h5") == 1
        assert f"its channel {tmp_path / other}.nii {reason}" in capsys.readouterr().out


def test_prepare__file_without_permission_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _nifti(tmp_path / "in/a.nii", HEAD)
    real = Path.read_bytes

    def denied(path: Path) -> bytes:  # the superuser may read anything
        if path.name == "a.nii":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert _run(tmp_path / "in", "--out", tmp_path / "c.h5") == 1
    assert _refused(capsys.readouterr().out) == {str(tmp_path / "in/a.nii"): "cannot be opened: Permission denied"}


def test_prepare__folder_without_permission_is_named_not_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _nifti(tmp_path / "in/a.nii", HEAD)
    _nifti(tmp_path / "in/closed/b.nii", _head(1))
    real = os.scandir

    def denied(path: Any = ".") -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert _run(tmp_path / "in", "--out", tmp_path / "c.h5") == 3
    found = _refused(capsys.readouterr().out)
    assert found == {str(tmp_path / "in/closed"): "this folder cannot be listed: Permission denied"}


def test_prepare__folder_that_links_to_itself_is_read_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _nifti(tmp_path / "in/sub/a.nii", HEAD)
    (tmp_path / "in/sub/again").symlink_to(tmp_path / "in")
    assert _run(tmp_path / "in", "--out", tmp_path / "c.h5") == 0
    assert len(VolumeCache(tmp_path / "c.h5")) == 1 and _refused(capsys.readouterr().out) == {}
