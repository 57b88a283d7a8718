"""Fixtures of all tests: small synthetic caches and the shared real scans."""

from __future__ import annotations

import csv
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401  (registers the filters)
import numpy as np
import pytest

from agssd.data_modules.build import CacheWriter
from agssd.scans.case import PreparedCase

Triple = tuple[int, int, int]


def make_case(
    shape: Triple = (40, 56, 40),
    seed: int = 0,
    modality: str = "mri",
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    channels: int = 1,
    labelled: bool = True,
    class_index: int = 0,
) -> PreparedCase:
    """Return a head-like ellipsoid with two labelled blobs; class 1 has a third, brighter blob."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    centre = rng.uniform(-0.08, 0.08, 3)[:, None, None, None]
    foreground = (((grid - centre) / rng.uniform(0.82, 0.95, 3)[:, None, None, None]) ** 2).sum(0) < 1
    label = np.zeros(shape, dtype=np.uint8)
    for value in (1, 2):
        middle = np.array([0.0, 0.35 if value == 1 else -0.35, 0.0]) + rng.uniform(-0.15, 0.15, 3)
        label[((grid - middle[:, None, None, None]) ** 2).sum(0) < rng.uniform(0.24, 0.32) ** 2] = value
    tissue = 300 + 120 * np.sin(4 * grid[0] + rng.uniform(0, 6)) * np.cos(5 * grid[2] + rng.uniform(0, 6))
    tissue = tissue + 350 * (label == 1) + 600 * (label == 2)
    if class_index == 1:
        tissue = tissue + 900 * (((grid - np.array([0.5, 0, 0.3])[:, None, None, None]) ** 2).sum(0) < 0.2**2)
    values = np.where(foreground, tissue + rng.normal(0, 15, shape), 0.0)
    if modality == "ct":
        values = np.where(foreground, values * 0.3 - 50, -1000.0)
    image = np.stack([np.round(values * (1 + 0.2 * c)) for c in range(channels)]).astype(np.int16)
    affine = np.zeros((4, 4))
    affine[3, 3] = 1.0
    for axis, world in enumerate((2, 1, 0)):
        affine[world, axis] = spacing_mm[axis]
    inside = image[:, foreground].astype(np.float64)
    slopes = [np.sqrt(sum(g**2 for g in np.gradient(c.astype(np.float64), *spacing_mm))) for c in image]
    ct = modality == "ct"
    return PreparedCase(
        image=image,
        foreground=foreground.astype(np.uint8),
        label=label if labelled else None,
        modality=modality,
        spacing_mm=spacing_mm,
        affine=affine,
        source_shape=(shape[2], shape[1], shape[0]),
        source_affine=affine[:, [2, 1, 0, 3]],
        source_sha256=f"{seed:064x}",
        scale=(1.0,) * channels,
        offset=(0.0,) * channels,
        low=(-1000.0,) * channels if ct else tuple(float(np.percentile(c, 0.05)) for c in inside),
        high=(1000.0,) * channels if ct else tuple(float(np.percentile(c, 99.95)) for c in inside),
        edge_q99=tuple(float(np.percentile(s[foreground], 99)) for s in slopes),
    )


def build_cache(
    path: Path,
    num_cases: int = 8,
    shape: Triple | list[Triple] = (40, 56, 40),
    modality: str = "mri",
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    channels: int = 1,
    labelled: bool = True,
    num_classes: int = 2,
    splits: list[str] | None = None,
    cases_per_subject: int = 1,
    seed: int = 0,
    layout: str = "chunks",
    compression: str = "blosc-lz4",
    salt: str | None = None,
) -> Path:
    """Write a cache of synthetic cases and return its path.

    ``shape`` is one for all or one per case; ``splits`` one per subject, by default 60 % train, then val and test in
    turn; ``num_classes`` 0 leaves the classes out; ``salt`` is the fingerprint that is noted.
    """
    num_subjects = -(-num_cases // cases_per_subject)
    if splits is None:
        num_train = max(1, round(0.6 * num_subjects))
        splits = ["train"] * num_train + [("val", "test")[row % 2] for row in range(num_subjects - num_train)]
    shapes = shape if isinstance(shape, list) else [shape] * num_cases
    names = [f"class{row}" for row in range(num_classes)]
    with CacheWriter(path, class_names=names, compression=compression, layout=layout) as writer:
        for row in range(num_cases):
            subject = row // cases_per_subject
            kind = row % num_classes if num_classes else 0
            case = make_case(shapes[row], seed + row, modality, spacing_mm, channels, labelled, kind)
            name = names[kind] if num_classes else None
            writer.add(case, f"case{row:03d}", f"subject{subject:03d}", splits[subject], name)
        writer.finish(salt_fingerprint=salt)
    return path


@pytest.fixture(scope="session")
def make_cache() -> Callable[..., Path]:
    """Return ``build_cache``: make_cache(path, num_cases=8, shape=(40, 56, 40), ...) -> path."""
    return build_cache


def spoil(path: Path, keys: list[str], out: Path) -> Path:
    """Copy a cache to ``out`` with images that cannot be decoded in the cases ``keys``, and return ``out``."""
    shutil.copyfile(path, out)
    places = []
    with h5py.File(out, "r") as file:
        for key in keys:
            image = file["cases"][key]["image"].id
            chunks = [image.get_chunk_info(number) for number in range(image.get_num_chunks())]
            places += [(chunk.byte_offset, chunk.size) for chunk in chunks]
    with out.open("r+b") as raw:
        for place, size in places:
            raw.seek(place)
            raw.write(b"\xff" * size)
    return out


@pytest.fixture(scope="session")
def spoil_cache() -> Callable[[Path, list[str], Path], Path]:
    """Return ``spoil``: spoil_cache(path, keys, out) -> out, a copy in which the images of some cases are broken."""
    return spoil


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache of 8 subjects, MRI 40x56x40 at 1 mm, labels 0 to 2, 2 classes, 5 train, 2 val, 1 test."""
    return build_cache(tmp_path_factory.mktemp("cache") / "tiny.h5")


@pytest.fixture(scope="session")
def region_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same as tiny_cache with region maps: cubes of 10 voxels, cut to the foreground."""
    from made_regions import Blocks

    from agssd.data_modules.regions import write_regions

    folder = tmp_path_factory.mktemp("regions")
    list(write_regions(build_cache(folder / "tiny.h5"), folder / "blocks.h5", Blocks()))
    return folder / "blocks.h5"


@pytest.fixture(scope="session")
def frames_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sequences and pictures of ultrasound with masks, of five persons each in two classes, and a cine; see fans.py."""
    from fans import save_folder

    from agssd.cli import main

    folder = save_folder(tmp_path_factory.mktemp("ultrasound"))
    rows = [("path", "subject", "label_path", "class", "modality", "split")]
    for person in range(5):
        split = ("train", "train", "train", "val", "test")[person]
        rows.append((f"s{person}.mha", f"a{person}", f"s{person}_mask.mha", "ab"[person % 2], "us", split))
        rows.append((f"p{person}.png", f"b{person}", f"p{person}_mask.png", "ba"[person % 2], "us", split))
    rows += [("cine.dcm", "PATIENT-7", "", "", "us", "train"), ("black.png", "PATIENT-8", "", "", "us", "train")]
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    out = tmp_path_factory.mktemp("frames") / "us.h5"
    assert main(["prepare", str(folder / "list.csv"), "--out", str(out)]) == 3  # the black picture is refused
    return out


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of shared real scans, or skip where there is none."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("AGSSD_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip("no shared scans: set AGSSD_SHARED_DATA to their folder")
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests have counted, each with ``record_property("printed", TEXT)``."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, text in getattr(report, "user_properties", []):
                if name == "printed" and report.when == "call":
                    terminalreporter.write_line(str(text))


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Return a file system of the size asked for by parameter, such as 256k; skip where none can be mounted."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(place)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted by this user: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of garbage collection, which makes that after every test cheap."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_open_wandb_run() -> Iterator[None]:
    """End a W&B run that a test has left open: the next one's logger would take it for its own."""
    yield
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()


def pytest_runtest_teardown() -> None:
    """Free trainers and modules, which refer to one another: Python would wait until gigabytes have gathered."""
    gc.collect()
