"""No name, date or number of a patient leaves the source: every byte that is written is searched for planted ones.

Planted are strings in headers of NIfTI, NRRD, MetaImage and DICOM, in names of folders, files and labels, and in
columns of manifests. Searched is everything below the folders that the commands write to, the home and the temporary
folder included: names of files, their bytes, and what is packed in them (gzip, zip, PNG, HDF5), in UTF-8 and UTF-16.

Not searched, since the user asks for it by name: the key map (``--key-map``), the salt, what ``agssd prepare`` and
``agssd doctor`` print of a source, the latter's ``findings.csv`` of a source (its ``report.html`` is searched), and the
paths that the user types for cache and run directory, which ``config.yaml`` repeats. Not found by such a search are
names burnt into voxels; whoever has such scans must not prepare them. Class names are stored as they are given.
"""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  # registers the filters of the cache
import nibabel as nib
import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest
import SimpleITK as sitk
from pydicom.uid import generate_uid

from agssd.cli import main

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (40, 44, 36)
PLANTED = {
    "folder": "Stmaryclinic",
    "folder of the patient": "Vandersloot",
    "file": "okonkwo19610723",
    "label": "raterfitzgibbon",
    "descrip": "Szymanska^Bronislawa",
    "aux_file": "mrn55012873",
    "intent_name": "Dumbrowska",
    "db_name": "accn990417",
    "extension": "DOB 1949-03-17 Achterberg",
    "NRRD field": "Featherstonehaugh",
    "MetaImage comment": "Quattlebaum",
    "manifest file": "listoflindqvist",
    "manifest subject": "Ingeborgpatient",
    "manifest remark": "bornon1952-11-30",
    "refused file": "brokenabernathy",
    "refused label": "shiftedmcgillicuddy",
    "DICOM folder": "Trondheimward",
    "DICOM file": "imoyelaran",
    "PatientName": "Wojciechowska^Zofia",
    "PatientID": "PID-778899-X",
    "PatientBirthDate": "19310228",
    "PatientAddress": "Kastanienallee 7",
    "InstitutionName": "Haukelandsykehus",
    "ReferringPhysicianName": "Brannigan^Aoife",
    "AccessionNumber": "AC20481632",
    "StudyDate": "20140228",
    "StudyDescription": "thyroidfollowup",
    "SeriesDescription": "neckoubliette",
    "StationName": "SCANNERHAUS3",
    "ImageComments": "moveddaughter",
    "StudyInstanceUID": generate_uid(entropy_srcs=["study of the privacy test"]),
    "SeriesInstanceUID": generate_uid(entropy_srcs=["series of the privacy test"]),
    "UID of the refused series": generate_uid(entropy_srcs=["refused series of the privacy test"]),
    "private tag": "Privatbesitzer",
    "refused DICOM file": "gapsvonhohenstein",
}
VISIBLE = "nameofthisrun"
NOISE = "zqxjk-never-written-anywhere"


# --- the search


def layers(data: bytes, place: str) -> Iterator[tuple[str, bytes]]:
    """Yield a file's bytes and, one inside the other, whatever is packed in them."""
    yield place, data
    if data[:2] == b"\x1f\x8b":
        yield from layers(zlib.decompressobj(wbits=31).decompress(data), f"{place} (gzip)")  # what a cut one has, too
    elif data[:4] == b"PK\3\4":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for info in archive.infolist():
                yield f"{place} (names)", info.filename.encode() + info.comment + info.extra
                yield from layers(archive.read(info), f"{place}/{info.filename}")
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        text = PIL.Image.open(io.BytesIO(data)).info
        yield f"{place} (text)", repr(text).encode()
    elif data[:8] == b"\x89HDF\r\n\x1a\n":
        with h5py.File(io.BytesIO(data), "r") as file:
            found: list[tuple[str, Any]] = [("/", file)]
            file.visititems(lambda name, item: found.append((name, item)))
            for name, item in found:
                attributes = {key: item.attrs[key] for key in item.attrs}
                yield f"{place}:{name} (name, attributes)", repr((name, attributes)).encode()
                if isinstance(item, h5py.Dataset):
                    yield from layers(np.asarray(item[()]).tobytes(), f"{place}:{name}")
    elif data[:1] == b"\x78" and len(data) > 2 and data[1] in (0x01, 0x5E, 0x9C, 0xDA):
        try:
            yield from layers(zlib.decompress(data), f"{place} (zlib)")
        except zlib.error:
            return


def search(roots: list[Path], wanted: dict[str, str]) -> dict[str, set[str]]:
    """Return where each of the wanted strings stands, in whatever case and of four encodings."""
    coded = {
        name: {text.lower().encode(code) for code in ("utf-8", "utf-16-le", "utf-16-be")}
        for name, text in wanted.items()
    }
    found: dict[str, set[str]] = {}
    for root in roots:
        for path in sorted(root.rglob("*")):
            place = path.relative_to(root).as_posix()
            parts = [(f"{place} (name)", place.encode())]
            for where, data in [*parts, *(layers(path.read_bytes(), place) if path.is_file() else ())]:
                lower = data.lower()
                for name, codes in coded.items():
                    if any(code in lower for code in codes):
                        found.setdefault(name, set()).add(where)
    return found


def test_search__finds_a_string_in_every_packing_and_encoding(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.bytes(5000)
    word = "Plantedword"
    packed = {
        "plain": noise + word.encode() + noise,
        "utf16": noise + word.encode("utf-16-le"),
        "upper": word.upper().encode(),
        "a.gz": gzip.compress(noise + word.encode("utf-16-be")),
    }
    for name, data in packed.items():
        (tmp_path / name).write_bytes(data)
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner.gz", gzip.compress(word.encode()))
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file.create_dataset("x", data=np.frombuffer(word.encode() * 90, np.uint8), compression="gzip")
    with h5py.File(tmp_path / "attribute.h5", "w") as file:
        file.create_group("group").attrs["who"] = word
    note = PIL.PngImagePlugin.PngInfo()
    note.add_itxt("Comment", word * 50, zip=True)
    PIL.Image.new("L", (4, 4)).save(tmp_path / "a.png", pnginfo=note)
    (tmp_path / f"of-{word}.txt").touch()
    (tmp_path / "clean").write_bytes(noise)
    places = search([tmp_path], {"word": word, "noise": NOISE})
    hit = {place.split(" ")[0].split(":")[0].split("/")[0] for place in places["word"]}
    assert hit == {*packed, "a.ckpt", "data.h5", "attribute.h5", "a.png", f"of-{word}.txt"}
    assert "noise" not in places


# --- the sources


def _head(seed: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    return np.where((grid**2).sum(0) < 0.8, rng.normal(300, 20, shape), np.abs(rng.normal(0, 4, shape))).astype("f4")


def _nifti(path: Path, array: np.ndarray, moved: float = 0.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.eye(4)
    affine[0, 3] = moved
    image = nib.Nifti1Image(array, affine)
    for field in ("descrip", "aux_file", "intent_name", "db_name"):
        image.header[field] = PLANTED[field].encode()
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", PLANTED["extension"].encode()))
    nib.save(image, path)


def _itk(path: Path, array: np.ndarray, key: str, value: str) -> None:
    image = sitk.GetImageFromArray(array.transpose())
    image.SetMetaData(key, value)
    sitk.WriteImage(image, str(path))


def _plant(root: Path, dicom: Any) -> list[Path]:
    """Make sources that name patients everywhere, two refused ones among them; return them."""
    clinic = root / PLANTED["folder"]
    patient = clinic / PLANTED["folder of the patient"]
    blob = np.zeros(SHAPE, dtype=np.uint8)
    blob[10:20, 10:20, 10:20] = 1
    for row in range(3):
        name = f"{PLANTED['file']}_{row}"
        _nifti(patient / f"{name}.nii.gz", _head(row))
        _nifti(patient / f"{name}_{PLANTED['label']}_seg.nii.gz", blob)
    _itk(patient / "a.nrrd", _head(3), "PatientName", PLANTED["NRRD field"])
    _itk(patient / "b.mha", _head(4), "Comment", PLANTED["MetaImage comment"])
    refused = clinic / "refused"
    _nifti(refused / f"{PLANTED['refused file']}.nii.gz", _head(5))
    whole = (refused / f"{PLANTED['refused file']}.nii.gz").read_bytes()
    (refused / f"{PLANTED['refused file']}.nii.gz").write_bytes(whole[: len(whole) // 2])
    _nifti(refused / "c.nii.gz", _head(6))
    _nifti(refused / f"c_{PLANTED['refused label']}_seg.nii.gz", blob, moved=9.0)
    ward = root / PLANTED["DICOM folder"]
    tags = {name: PLANTED[name] for name in PLANTED if name[0].isupper() and " " not in name}
    stored = (_head(7).transpose(2, 1, 0) + 5).astype(np.uint16)
    slices = dicom.series_of(stored, modality="MR", spacing_mm=(1.0, 1.0, 1.0), **tags)
    for data in slices:
        data.add_new(0x00091010, "LO", PLANTED["private tag"])
    dicom.save(ward, slices, PLANTED["DICOM file"] + "{:03d}.dcm")
    gaps = dicom.series_of(stored, modality="MR", spacing_mm=(1.0, 1.0, 1.0), **tags)
    for data in gaps:
        data.SeriesInstanceUID = PLANTED["UID of the refused series"]
    del gaps[3], gaps[9], gaps[17]
    dicom.save(ward / "gaps", gaps, PLANTED["refused DICOM file"] + "{:03d}.dcm")
    lists = root / "lists"
    for row in range(2):
        _nifti(lists / f"d{row}.nii.gz", _head(10 + row))
    manifest = lists / f"{PLANTED['manifest file']}.csv"
    rows = [f"d{row}.nii.gz,{PLANTED['manifest subject']}{row},{PLANTED['manifest remark']}" for row in range(2)]
    manifest.write_text("\n".join(["path,subject,remark", *rows, ""]))
    return [clinic, ward, manifest]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, dicom: Any) -> Iterator[dict[str, Any]]:
    """Run the commands that need no training; yield sources, what was printed, and the folders written to."""
    root = tmp_path_factory.mktemp("run")
    source, work, home = (root / name for name in ("source", "work", "home"))
    for folder in (source, work, home / "tmp"):
        folder.mkdir(parents=True)
    sources = _plant(source, dicom)
    state = {"source": source, "work": work, "home": home, "printed": {}}
    build = ["prepare", *sources, "--labels", "*_seg.nii.gz", "--modality", "mri", "--salt", source / "salt"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        patch.setenv("HOME", str(home))
        patch.setattr(tempfile, "tempdir", str(home / "tmp"))
        assert _agssd(state, *build, "--out", work / "c.h5", "--key-map", source / "keys.csv") == 3
        assert _agssd(state, *build, "--out", work / "shards.h5", "--shard", "0/1") == 3  # leaves its parts
        assert _agssd(state, "inspect", work / "c.h5", "--json", "--draw", work / "c.png") == 0
        with h5py.File(work / "c.h5") as file:
            state["keys"] = sorted(file["cases"])
        assert _agssd(state, "extract", work / "c.h5", state["keys"][0], "--out", work / "x.nii.gz") == 0
        assert _agssd(state, "doctor", work / "c.h5", "--out", work / "doctor") in (0, 3)
        state["printed"]["doctor of the cache"] = state["printed"]["doctor"]
        report = ["doctor", *sources, "--labels", "*_seg.nii.gz", "--modality", "mri", "--out", work / "doctor-source"]
        assert _agssd(state, *report) == 3
        (work / "doctor-source/findings.csv").rename(source / "findings.csv")  # it is to name files
        yield state


def _agssd(state: dict[str, Any], *arguments: object) -> int:
    """Run a command and keep what it prints."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        code = main([str(argument) for argument in arguments])
    state["printed"][str(arguments[0])] = printed.getvalue()
    return code


def _agssd_apart(state: dict[str, Any], *arguments: object) -> int:
    """Run a command in a process of its own, at home in a folder that is searched too."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "TMPDIR": str(state["home"] / "tmp"),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
    }
    words = [sys.executable, "-m", "agssd", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=state["work"], env=environment, timeout=300)
    state["printed"][str(arguments[0])] = done.stdout + done.stderr
    return done.returncode


def test_sources__every_planted_string_can_be_found(made: dict[str, Any]) -> None:
    found = search([made["source"]], {**PLANTED, "noise": NOISE})
    assert set(found) == set(PLANTED)
    for name in ("descrip", "aux_file", "intent_name", "db_name", "extension"):
        assert all("(gzip)" in place for place in found[name]), name  # only once unpacked


def test_prepare__nothing_planted_is_in_cache_parts_pictures_or_extracts(made: dict[str, Any]) -> None:
    assert len(made["keys"]) == 3 + 2 + 1 + 2  # three NIfTI, NRRD and MetaImage, one DICOM series, two of the manifest
    names = {path.relative_to(made["work"]).as_posix() for path in made["work"].rglob("*")}
    assert {"c.h5", "c.png", "x.nii.gz"} <= names and any(name.startswith("doctor/") for name in names)
    assert sum(name.endswith(".refused") for name in names) >= 2, "the notes on refused scans are searched too"
    assert "doctor-source/report.html" in names
    assert search([made["work"], made["home"]], PLANTED) == {}


def test_prepare__names_are_only_where_they_are_asked_for(made: dict[str, Any]) -> None:
    keys = (made["source"] / "keys.csv").read_text()
    assert PLANTED["file"] in keys and PLANTED["PatientID"] in keys and PLANTED["manifest subject"] in keys
    findings = (made["source"] / "findings.csv").read_text()
    assert PLANTED["refused file"] in findings and PLANTED["refused label"] in findings
    for command in ("inspect", "extract", "doctor of the cache"):
        text = made["printed"][command].lower()
        assert text and not [name for name, word in PLANTED.items() if word.lower() in text], command


@pytest.mark.slow
def test_fit_and_export__nothing_planted_is_in_logs_pictures_checkpoints_or_exports(made: dict[str, Any]) -> None:
    work = made["work"]
    settings = {
        "data.cache": work / "c.h5",
        "data.global_batch_size": 2,
        "data.num_workers": 1,
        "trainer.max_steps": 2,
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": work / "run",
        "view_panels.every_n_steps": 1,
        "wandb.mode": "offline",
        "wandb.name": VISIBLE,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    assert _agssd_apart(made, "fit", "--config", ROOT / "conf/experiment/agssd_small.yaml", *words) == 0, made[
        "printed"
    ]
    assert _agssd_apart(made, "export", work / "run", "--out", work / "encoder") == 0, made["printed"]
    names = {path.relative_to(work / "run").as_posix() for path in (work / "run").rglob("*")}
    assert {"config.yaml", "metrics.csv", "checkpoints/last.ckpt", "panels/step_000002.png"} <= names
    assert any(name.endswith(".wandb") for name in names) and any((work / "encoder").iterdir())
    found = search([work, made["home"]], {**PLANTED, "visible": VISIBLE})
    kinds = {place.split("/")[-1].rpartition(".")[2] for place in found.pop("visible")}
    assert {"yaml", "pkl", "wandb"} <= kinds, "what configuration, checkpoint and W&B hold is seen"
    assert found == {}
    for command in ("fit", "export"):
        text = made["printed"][command].lower()
        assert not [name for name, word in PLANTED.items() if word.lower() in text], command
