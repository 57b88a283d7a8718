"""Public sets by name, from a small HTTP server on loopback with small made sets."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import monai.apps
import nibabel as nib
import numpy as np
import pytest
import torchio.datasets
from torchio.datasets.medmnist import MedMNIST

from agssd.commands import prepare
from agssd.data_modules.cache import VolumeCache
from agssd.scans.sources import public
from agssd.scans.sources.plan import plan_sources


class Server:
    """Serves ``files`` and counts the requests; a file in ``cut`` ends half-way through."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: set[str] = set()
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.split("?")[0].lstrip("/")
                outer.asked.append(name)
                data = outer.files.get(name)
                self.send_response(404 if data is None else 200)
                self.send_header("Content-Length", str(len(data or b"")))
                self.end_headers()
                self.wfile.write((data or b"")[: len(data or b"") // 2] if name in outer.cut else data or b"")

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def add(self, name: str, data: bytes) -> tuple[str, str]:
        self.files[name] = data
        return f"{self.url}/{name}", hashlib.md5(data).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def _nifti(seed: int, shape: tuple[int, int, int] = (18, 20, 16), label: bool = False) -> bytes:
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    head = np.where((grid**2).sum(0) < 0.8, rng.normal(300, 20, shape), np.abs(rng.normal(0, 4, shape)))
    array = (head > 250).astype(np.uint8) if label else head.astype(np.float32)
    image = nib.Nifti1Image(array, np.diag([2.0, 2.0, 2.0, 1.0]))
    return bytes(_gzip(image.to_bytes()))


def _gzip(data: bytes) -> bytes:
    import gzip

    return gzip.compress(data, mtime=0)


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _hippocampus(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    task = "Task04_Hippocampus"
    files = {}
    for row in range(4):
        files[f"{task}/imagesTr/hippocampus_{row:03d}.nii.gz"] = _nifti(row)
        files[f"{task}/labelsTr/hippocampus_{row:03d}.nii.gz"] = _nifti(row, label=True)
        files[f"{task}/imagesTr/._hippocampus_{row:03d}.nii.gz"] = b"resource fork"
    files[f"{task}/imagesTs/hippocampus_009.nii.gz"] = _nifti(9)
    entries = [
        {"image": f"./imagesTr/hippocampus_{row:03d}.nii.gz", "label": f"./labelsTr/hippocampus_{row:03d}.nii.gz"}
        for row in range(4)
    ]
    listing = {"modality": {"0": "MRI"}, "training": entries, "test": ["./imagesTs/hippocampus_009.nii.gz"]}
    files[f"{task}/dataset.json"] = json.dumps(listing).encode()
    url, md5 = server.add(f"{task}.tar", _tar(files))
    monkeypatch.setitem(monai.apps.DecathlonDataset.resource, task, url)
    monkeypatch.setitem(monai.apps.DecathlonDataset.md5, task, md5)
    return f"msd:{task}"


def _organ(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        arrays[f"{split}_images"] = rng.normal(120, 30, (count, 28, 28, 28)).clip(0, 255).astype(np.uint8)
        arrays[f"{split}_labels"] = np.arange(count, dtype=np.uint8)[:, None] % 11
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    _, md5 = server.add("organmnist3d.npz", buffer.getvalue())
    monkeypatch.setattr(MedMNIST, "BASE_URL", server.url)
    monkeypatch.setitem(public._GREY_SETS, "organ", public._GREY_SETS["organ"]._replace(md5=md5))
    return "medmnist3d:organ"


def _ixi_tiny(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    people = [f"IXI{row:03d}-Guys-07{row:02d}" for row in (2, 12, 13)]
    files = {f"ixi_tiny/image/{name}_image.nii.gz": _nifti(row) for row, name in enumerate(people)}
    files |= {f"ixi_tiny/label/{name}_label.nii.gz": _nifti(row, label=True) for row, name in enumerate(people)}
    url, md5 = server.add("ixi_tiny.zip", _zip(files))
    monkeypatch.setattr(torchio.datasets.IXITiny, "url", url + "?dl=1")
    monkeypatch.setattr(torchio.datasets.IXITiny, "md5", md5)
    return "ixi-tiny"


def _ixi_t1(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    files = {f"IXI{row:03d}-HH-1{row:03d}-T1.nii.gz": _nifti(row) for row in (2, 13)}
    _, md5 = server.add("IXI-T1.tar", _tar(files))
    monkeypatch.setattr(torchio.datasets.IXI, "base_url", server.url + "/IXI-{modality}.tar")
    monkeypatch.setitem(torchio.datasets.IXI.md5_dict, "T1", md5)
    return "ixi:T1"


Maker = Callable[[Server, pytest.MonkeyPatch], str]
MADE: list[Maker] = [_hippocampus, _organ, _ixi_tiny, _ixi_t1]


def _run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    return prepare.run(parser.parse_args([str(argument) for argument in arguments]))


def _left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


@pytest.mark.parametrize("make", MADE)
def test_prepare__set_by_name_is_downloaded_once_and_then_needs_no_network(
    make: Maker, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = make(server, monkeypatch)
    assert _run(name, "--out", tmp_path / "c.h5") == 0
    captured = capsys.readouterr()
    assert captured.out.count("licence CC BY") == 1 and "https://" in captured.out or "http://" in captured.out
    assert captured.out.count("downloading http") == len(server.asked) == 1
    assert _left(tmp_path / "downloads") == [name.replace(":", "-")]
    assert not list((tmp_path / "downloads").rglob("*.tar")) + list((tmp_path / "downloads").rglob("*.zip"))
    before = (tmp_path / "c.h5").read_bytes()
    server.files.clear()
    assert _run(name, "--out", tmp_path / "c.h5", "--overwrite") == 0
    assert len(server.asked) == 1 and (tmp_path / "c.h5").read_bytes() == before


def test_decathlon__labels_subjects_and_modality(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources, _ = public.local_sources([Path(_hippocampus(server, monkeypatch))], tmp_path)
    plan = plan_sources(sources)
    assert [job.subject for job in plan.jobs] == [f"hippocampus_{row:03d}" for row in (0, 1, 2, 3, 9)]
    assert [job.label and job.label.name for job in plan.jobs] == [job.paths[0].name for job in plan.jobs[:4]] + [None]
    assert {job.modality for job in plan.jobs} == {"mri"} and not plan.refused


def test_medmnist__classes_splits_and_voxels_are_the_sets(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(_organ(server, monkeypatch), "--out", tmp_path / "c.h5") == 0
    assert "1 mm is written and means one voxel" in capsys.readouterr().out
    cache = VolumeCache(tmp_path / "c.h5")
    assert [len(cache.select(split)) for split in ("train", "val", "test")] == [4, 2, 3]
    assert cache.class_names == ("0", "1", "2", "3") and {case.shape for case in cache.cases} == {(28, 28, 28)}
    assert len({case.subject for case in cache.cases}) == 9
    with np.load(io.BytesIO(server.files["organmnist3d.npz"])) as arrays:
        wanted = sorted(
            (split, int(a.sum()), int(kind))
            for split in ("train", "val", "test")
            for a, kind in zip(arrays[f"{split}_images"], arrays[f"{split}_labels"][:, 0], strict=True)
        )
        clipped = {int(a.sum()): a for split in ("train", "val", "test") for a in arrays[f"{split}_images"]}
    found = []
    for row, case in enumerate(cache.cases):
        stored = cache.read_whole(row, "image")[0].transpose(2, 1, 0)
        near = min(clipped, key=lambda total: np.abs(clipped[total].astype(int) - stored).mean())
        assert np.array_equal(np.clip(clipped[near], case.low[0], case.high[0]), stored)
        found.append((case.split, near, case.class_index))
    assert sorted(found) == wanted


def test_ixi__one_person_is_one_subject_in_all_its_sets(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = [Path(make(server, monkeypatch)) for make in (_ixi_tiny, _ixi_t1)]
    plan = plan_sources(public.local_sources(names, tmp_path)[0])
    assert [job.subject for job in plan.jobs] == ["IXI002", "IXI012", "IXI013", "IXI002", "IXI013"]
    assert [job.label.name if job.label else None for job in plan.jobs] == [
        "IXI002-Guys-0702_label.nii.gz",
        "IXI012-Guys-0712_label.nii.gz",
        "IXI013-Guys-0713_label.nii.gz",
        None,
        None,
    ]


@pytest.mark.parametrize("make", MADE)
@pytest.mark.parametrize("fault", ["cut", "changed", "gone", "refused"])
def test_prepare__failed_download_is_one_line_and_leaves_nothing(
    make: Maker,
    fault: str,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    name = make(server, monkeypatch)
    (archive,) = server.files
    whole = server.files[archive]
    if fault == "cut":
        server.cut.add(archive)
    elif fault == "changed":
        server.files[archive] = whole[:-1] + bytes([whole[-1] ^ 1])
    elif fault == "gone":
        server.files.clear()
    else:
        server.http.shutdown()
        server.http.server_close()
    assert _run(name, "--out", tmp_path / "c.h5") == 1
    captured = capfd.readouterr()
    reason = {"cut": "retrieval incomplete", "changed": "its checksum is not the published one", "gone": "Not Found"}
    assert reason.get(fault, "Connection refused") in captured.err
    assert len(captured.err.splitlines()) == 1 and captured.err.startswith(f"error: {server.url}")
    place = tmp_path / "downloads" / name.replace(":", "-")
    assert f"nothing was kept. The folder {place} from a machine that has it serves as well" in captured.err
    assert _left(tmp_path) == []
    if fault in ("cut", "changed"):  # and the next run starts afresh
        server.cut.clear()
        server.files[archive] = whole
        assert len(list(public.fetch(name, tmp_path / "downloads").rglob("*.nii*"))) > 1


def test_fetch__what_a_killed_download_left_is_thrown_away(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = _hippocampus(server, monkeypatch)
    partial = tmp_path / ".msd-Task04_Hippocampus.part"
    (partial / "Task04_Hippocampus").mkdir(parents=True)
    (partial / "Task04_Hippocampus/dataset.json").write_text("{}")
    (partial / "Task04_Hippocampus.tar").write_bytes(server.files["Task04_Hippocampus.tar"][:1000])
    (tmp_path / ".msd-Task04_Hippocampus.lock").touch()
    place = public.fetch(name, tmp_path)
    assert len(list((place / "imagesTr").glob("h*.nii.gz"))) == 4
    assert _left(tmp_path) == ["msd-Task04_Hippocampus"]


def test_fetch__a_second_process_waits_for_the_first(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = _ixi_t1(server, monkeypatch)
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(0.5)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / ".ixi-T1.lock"], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    said: list[str] = []
    public.fetch(name, tmp_path, said.append)
    assert holder.wait(10) == 0 and "another process downloads" in said[0] and len(server.asked) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("msd:Task04_Hipocampus", "did you mean msd:Task04_Hippocampus? Known sets: msd:Task01_BrainTumour"),
        ("msd:", "Known sets: msd:Task01_BrainTumour"),
        ("medmnist3d:organs", "did you mean medmnist3d:organ?"),
        ("ixitiny", "did you mean ixi-tiny?"),
        ("ixi:t1", "did you mean ixi:T1?"),
        ("medmnist3d:adrenal", "is not offered: it holds binary shapes"),
        ("imagenet:train", "is neither a file nor a public set"),
    ],
)
def test_local_sources__unknown_name_lists_the_known_ones(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        public.local_sources([Path(name)], tmp_path / "downloads")
    assert message in str(caught.value) and _left(tmp_path) == []


def test_local_sources__files_and_missing_files_are_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "msd:Task04_Hippocampus").mkdir()
    given = [Path("msd:Task04_Hippocampus"), Path("none/a:b.nii"), Path("scans"), Path("m.csv")]
    assert public.local_sources(given, tmp_path) == (given, [])


def test_sets__are_those_of_the_libraries() -> None:
    tasks = [name.partition(":")[2] for name in public.SETS if name.startswith("msd:")]
    assert set(tasks) == set(monai.apps.DecathlonDataset.resource) == set(monai.apps.DecathlonDataset.md5)
    contrasts = {name.partition(":")[2] for name in (*public.SETS, *public._LEFT_OUT) if name.startswith("ixi:")}
    assert contrasts == set(torchio.datasets.IXI.md5_dict)
    assert "5208230" in MedMNIST.BASE_URL  # the record whose checksums we state
    parts = {name.partition(":")[2] for name in (*public.SETS, *public._LEFT_OUT) if name.startswith("medmnist3d:")}
    assert parts == {kind.__name__.removesuffix("MNIST3D").lower() for kind in MedMNIST.__subclasses__()}
