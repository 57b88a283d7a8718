"""The shipped benches on small made data in the layout of each set: the commands of their heads, and one tiny cell."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml

from agssd.cli import main
from agssd.commands.bench.cells import Cell, list_cells, pretrain, train_and_measure
from agssd.commands.bench.probes import probe
from agssd.commands.bench.records import Job
from agssd.commands.bench.settings import Bench, read_settings
from agssd.data_modules.cache import VolumeCache
from agssd.lightning_cli import ParsedFit
from agssd.scans.keys import open_salt, subject_key

ROOT = Path(__file__).resolve().parents[2]
BENCHES = sorted((ROOT / "conf" / "bench").glob("*.yaml"))
Shape = tuple[int, int, int]
SHAPE = (44, 48, 40)


def save(path: Path, array: np.ndarray, spacing: tuple[float, ...] = (1.5, 1.5, 2.0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([*spacing, 1.0])), path)


def made(seed: int, values: list[int], ct: bool = True, shape: Shape = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Return a body with a brick of each value, brighter the higher the value, and its label map."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    body = ((grid / rng.uniform(0.85, 0.95, 3)[:, None, None, None]) ** 2).sum(0) < 1
    label = np.zeros(shape, np.uint8)
    places = [(x, y, z) for z in (10, 17, 24) for y in (13, 21, 29) for x in (12, 19, 26)]
    for value, (x, y, z) in zip(values, places, strict=False):
        x, y, z = np.add((x, y, z), rng.integers(-1, 2, 3))
        label[x : x + 4, y : y + 5, z : z + 4] = value
    tissue = 40 + 15.0 * np.searchsorted(values, label) * (label > 0) + rng.normal(0, 12, shape)
    image = np.where(body, tissue, -1000) if ct else np.where(body, 300 + tissue, 0)
    return np.rint(image).astype(np.int16), label


def decathlon(folder: Path, count: int, values: list[int], ct: bool, stem: str, more: dict[str, Any]) -> None:
    entries = []
    for number in range(1, count + 1):
        name = f"{stem}_{number:04d}.nii.gz"
        image, label = made(number, values, ct)
        save(folder / "imagesTr" / name, image)
        save(folder / "labelsTr" / name, label)
        entries.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    listing = {"modality": {"0": "CT" if ct else "MRI"}, "training": entries, "test": [], **more}
    (folder / "dataset.json").write_text(json.dumps(listing))


def hippocampus(folder: Path) -> None:
    held = {"suggested_split": {"train": [f"{n:04d}" for n in range(1, 9)], "val": [f"{n:04d}" for n in range(9, 13)]}}
    decathlon(folder / "HIPPOCAMPUS", 12, [1, 2], False, "hippocampus", held)
    for number in range(1, 13):  # every third with a smaller or larger share of label 1
        path = folder / "HIPPOCAMPUS" / "labelsTr" / f"hippocampus_{number:04d}.nii.gz"
        label = np.asanyarray(nib.load(path).dataobj).copy()
        label[(label == 1 + number % 2) & (np.indices(label.shape)[1] > 14) & (number % 3 > 0)] = 0
        save(path, label)


def btcv(folder: Path) -> None:
    for number in range(1, 7):
        image, label = made(number, list(range(1, 14)))
        save(folder / "BTCV" / "Training" / "img" / f"img{number:04d}.nii.gz", image)
        save(folder / "BTCV" / "Training" / "label" / f"label{number:04d}.nii.gz", label)


def spleen(folder: Path) -> None:
    decathlon(folder / "downloads" / "msd-Task09_Spleen", 6, [1], True, "spleen", {})


def amos(folder: Path) -> None:
    decathlon(folder / "AMOS", 6, list(range(1, 16)), True, "amos", {"validation": []})
    image, label = made(9, list(range(1, 16)))
    save(folder / "AMOS" / "imagesVa" / "amos_0008.nii.gz", image)
    save(folder / "AMOS" / "labelsVa" / "amos_0008.nii.gz", label)
    image, label = made(7, list(range(1, 16)), ct=False)
    save(folder / "AMOS" / "imagesVa" / "amos_0507.nii.gz", image)
    save(folder / "AMOS" / "labelsVa" / "amos_0507.nii.gz", label)


def luna16(folder: Path) -> None:
    sitk: Any = import_module("SimpleITK")
    for number in range(6):
        image, label = made(number, [3, 4, 5])
        for place, array in (("subset0", image), ("seg-lungs-LUNA16", label)):
            file = sitk.GetImageFromArray(array.transpose(2, 1, 0))
            file.SetSpacing((1.5, 1.5, 2.0))
            path = folder / "LUNA16" / place / f"1.3.6.1.4.1.{number}.mhd"
            path.parent.mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(file, str(path))


def brats(folder: Path) -> None:
    for number in range(6):
        name = f"BraTS2021_{number:05d}"
        for place, contrast in enumerate(("flair", "t1", "t1ce", "t2", "seg")):
            image, label = made(10 * number + place, [1, 2, 4], ct=False)
            _, label = made(10 * number, [1, 2, 4])
            save(
                folder / "BRATS" / name / f"{name}_{contrast}.nii.gz", label if contrast == "seg" else image, (1, 1, 1)
            )


def medmnist3d(folder: Path) -> None:
    place = folder / "downloads" / "medmnist3d-organ"
    lines = ["path,subject,modality,class,split"]
    for split, count in (("train", 12), ("val", 2), ("test", 11)):
        for number in range(count):
            image, _ = made(len(lines), [number % 11 + 1], ct=False)
            path = f"images/{split}{number:05d}.nii"
            save(place / path, (image[8:36, 10:38, 6:34] // 4).astype(np.uint8), (1, 1, 1))
            lines.append(f"{path},{split}{number},mri,{number % 11},{split}")
    (place / "manifest.csv").write_text("\n".join(lines) + "\n")


def adni(folder: Path) -> None:
    lines = ["path,subject,class"]
    for number in range(12):
        image, _ = made(number, [1, 2], ct=False)
        save(folder / "t1" / f"{number}.nii.gz", image, (1, 1, 1))
        save(folder / "t1" / f"{number}_later.nii.gz", (image + 3 * (image > 0)).astype(np.int16), (1, 1, 1))
        lines += [f"t1/{number}{visit}.nii.gz,S_{number:04d},{('AD', 'CN')[number % 2]}" for visit in ("", "_later")]
    (folder / "adni.csv").write_text("\n".join(lines) + "\n")


def ct_organs(folder: Path) -> None:
    image, label = made(1, [1, 2, 5, 6, 18, 21, 52, 25, 75, 80, 10])
    save(folder / "SCANS" / "totalseg_ct.nii.gz", image, (4, 4, 4))
    save(folder / "SCANS" / "totalseg_ct_seg.nii.gz", label, (4, 4, 4))


MAKERS: dict[str, Callable[[Path], None]] = {
    "hippocampus": hippocampus,
    "hippocampus_ablation": hippocampus,
    "hippocampus_head": hippocampus,
    "hippocampus_regions": hippocampus,
    "btcv": btcv,
    "msd_spleen": spleen,
    "amos": amos,
    "luna16": luna16,
    "brats": brats,
    "medmnist3d": medmnist3d,
    "adni": adni,
    "ct_organs": ct_organs,
    "heads": lambda folder: None,
}
SMALLER = {"--subjects 24 4 16": "--subjects 4 1 2", "--spacing-mm 2.5": "--spacing-mm 3"}
CASES = {
    "btcv": 6,
    "msd_spleen": 6,
    "amos": 7,
    "luna16": 6,
    "brats": 6,
    "medmnist3d": 25,
    "adni": 24,
    "hippocampus": 12,
    "hippocampus_ablation": 12,
    "hippocampus_regions": 12,
}


def commands(path: Path) -> list[list[str]]:
    """Return the commands in the head of a bench up to its own, each without ``agssd``."""
    head = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    for full, small in SMALLER.items():
        head = head.replace(full, small)
    lines = re.sub(r"\\\n#\s+", "", head).splitlines()
    found = [shlex.split(line[1:])[1:] for line in lines if line.startswith("#   agssd ")]
    return found[: [words[0] for words in found].index("bench") + 1]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return where the data of benches have been made so far."""
    return {}


@pytest.fixture
def bench_words(
    request: pytest.FixtureRequest,
    places: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    """Return the words of the bench's own command, in a folder where those before it have been run."""
    path: Path = request.param
    monkeypatch.setenv("WANDB_MODE", "disabled")
    found = commands(path)
    if path.stem not in places:
        folder = tmp_path_factory.mktemp(path.stem)
        (folder / "conf").symlink_to(ROOT / "conf")
        monkeypatch.chdir(folder)
        MAKERS[path.stem](folder)
        for words in found[:-1]:
            assert main(words) in (0, 3), words
        places[path.stem] = folder
    monkeypatch.chdir(places[path.stem])
    return found[-1]


LONG = ("heads", "hippocampus_regions")  # whose cache takes long to make
parametrised = pytest.mark.parametrize(
    "bench_words",
    [pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem in LONG else ()) for path in BENCHES],
    indirect=True,
)


def test_bases__each_is_laid_under_a_bench() -> None:
    found: set[Path] = set()

    def follow(path: Path) -> None:
        bases = yaml.safe_load(path.read_text()).get("base", [])
        for base in [bases] if isinstance(bases, str) else bases:
            found.add(path.parent / base)
            follow(path.parent / base)

    for path in BENCHES:
        follow(path)
    assert found == set((ROOT / "conf" / "bench" / "base").glob("*.yaml"))


PUBLIC = ("adni", "amos", "brats", "btcv", "luna16", "msd_spleen")  # at full size
WORK = re.compile(r"# Work: (\d+) pretrainings of (\d+) steps; (\d+) cells that train, of (\d+) steps in all")


def full_size() -> list[Path]:
    return [path for path in BENCHES if path.stem in PUBLIC]


@pytest.mark.parametrize("path", full_size(), ids=lambda path: path.stem)
def test_full_size__head_says_how_much_work_it_is(path: Path) -> None:
    settings = read_settings(path, quick=False)
    cells = list_cells(settings, "c.h5", Path("out"))
    trained = [cell for cell in cells if cell.fit]
    pretrainings = {cell.pretraining for cell in cells if cell.pretraining is not None}
    found = WORK.search(path.read_text())
    assert found is not None
    told = [int(number) for number in found.groups()]
    assert told == [len(pretrainings), settings.pretrain_steps, len(trained), sum(cell.steps for cell in trained)]
    assert told[0] * told[1] <= 400_000 and told[3] <= 3_500_000, "days of one GPU"


@pytest.mark.parametrize("path", full_size(), ids=lambda path: path.stem)
def test_full_size__few_labels_have_draws_and_seeds_and_each_fraction_a_readout(path: Path) -> None:
    settings = read_settings(path, quick=False)
    assert (settings.draws, settings.seeds) == (5, 5)
    assert all(settings.seeds_of(name) == 5 for name in settings.readouts)
    cheap = [name for name, one in settings.readouts.items() if one.labels is None]
    assert cheap and all(settings.readouts[name].probe or max(settings.readouts[name].steps) <= 1000 for name in cheap)
    if settings.num_folds is None:
        assert settings.labels == ["1%", "5%", "10%", "25%", "50%", "100%"]
    full = {cell.readout for cell in list_cells(settings, "c.h5", Path("out")) if cell.labels == "100%"}
    assert full >= set(settings.readouts) - {"finetune_stem"}, "which has finetune_stem_all"
    trained = {name for name, one in settings.readouts.items() if one.probe is None}
    measured = {cell.readout for cell in list_cells(settings, "c.h5", Path("out")) if cell.method == "scratch"}
    assert trained <= measured, "what all are held against"


@pytest.mark.parametrize("path", BENCHES, ids=lambda path: path.stem)
def test_commands__of_public_data_draw_the_same_subjects_everywhere(path: Path) -> None:
    prepared = next(words for words in commands(path) if words[0] == "prepare")
    salt = prepared[prepared.index("--salt") + 1] if "--salt" in prepared else None
    assert salt == (None if path.stem == "adni" else "conf/bench/public.salt"), "a salt that all know hides nobody"
    assert subject_key(open_salt(ROOT / "conf" / "bench" / "public.salt")[0], "hippocampus_001") == "01c1ac47aef3d916"


@parametrised
def test_commands__make_the_cache_that_the_bench_reads(
    bench_words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config, cache = Path(bench_words[bench_words.index("--config") + 1]), bench_words[bench_words.index("--cache") + 1]
    settings = read_settings(config, quick=True)
    cases = VolumeCache(cache).cases
    assert len(cases) == CASES.get(config.stem, len(cases))
    if settings.figure == "dice":
        values = {value for case in cases for value in case.label_values or ()}
        assert max(values) == (settings.num_classes or 3) - 1, "as many classes as the bench has"
    else:
        assert len(VolumeCache(cache).class_names) == (settings.num_classes or 2)
        assert all(case.class_index is not None for case in cases)
    for quick in ([], ["--quick"]):
        assert main([*bench_words, *quick, "--dry-run"]) == 0
        told = capsys.readouterr().out
        assert "agssd fit" in told and "0 done" in told


def tiny(settings: Bench, quick: Bench) -> Bench:
    """Return methods and readouts at the size of the quick form, one step and all labels of each."""
    small = ["--data.num_workers", "0", "--trainer.precision", "32-true"]
    no_probe = ["--online_probe.at_start", "false", "--online_probe.at_end", "false"]
    return replace(
        settings,
        labels=["100%"],
        pretrain_steps=1,
        seeds=1,
        draws=1,
        num_folds=quick.num_folds,
        backbone=quick.backbone,
        readouts={
            name: replace(one, steps=one.steps and [1], labels=None, window_vox=one.window_vox and [32, 32, 32])
            for name, one in settings.readouts.items()
        },
        pretrain_common=[*quick.pretrain_common, *small, *no_probe, "--data.global_batch_size", "2"],
        fit_common=[*quick.fit_common, *small, "--data.global_batch_size", "2"],
    )


def figures_of(settings: Bench, cache: str, cells: list[Cell]) -> dict[tuple[str, str], dict[str, float]]:
    """Return the figure of each subject by method and readout, of cells of one seed, draw and fold."""
    job = Job(settings, cache, "c")
    for one in dict.fromkeys(cell.pretraining for cell in cells):
        if one is not None:
            pretrain(one, job)
    probes: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.fit:
            train_and_measure(cell, job)
        else:
            probes.setdefault(cell.method, []).append(cell)
    for group in probes.values():
        probe(group, job)
    return {
        (cell.method, cell.readout): json.loads((cell.folder / "row.json").read_text())["subjects"] for cell in cells
    }


@pytest.mark.slow
@parametrised
def test_bench__one_tiny_cell_of_each_kind(bench_words: list[str], tmp_path: Path) -> None:
    config, cache = Path(bench_words[bench_words.index("--config") + 1]), bench_words[bench_words.index("--cache") + 1]
    quick = read_settings(config, quick=True)
    settings = tiny(quick, quick)
    cells = [cell for cell in list_cells(settings, cache, tmp_path) if cell.method == "agssd" and not cell.fold]
    chosen = [cell for cell in cells if cell.fit][:1] + [cell for cell in cells if not cell.fit]
    measured = [*figures_of(settings, cache, chosen).values()]
    assert measured and measured[0] and all(found.keys() == measured[0].keys() for found in measured)
    assert all(0 <= sum(found.values()) / len(found) <= 1 for found in measured)


ENCODERS = {"scratch", "agssd", "mae", "ibot"}
DECODERS = {"finetune", "finetune_stem", "finetune_stem_all", "frozen", "linear"}
UNET = {("unet", "finetune_stem"), ("unet", "finetune_stem_all")}
KINDS = {  # what these have at full size
    "adni": set(product(ENCODERS, {"finetune", "attentive"})) | set(product(ENCODERS, {"linear", "knn"})),
    "brats": set(product(ENCODERS, DECODERS)) | UNET,
    "btcv": set(product(ENCODERS, DECODERS)) | set(product(ENCODERS, {"knn"})) | UNET,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "bench_words", [pytest.param(path, id=path.stem) for path in BENCHES if path.stem in KINDS], indirect=True
)
def test_full_form__one_tiny_cell_of_each_method_and_readout(bench_words: list[str], tmp_path: Path) -> None:
    config, cache = Path(bench_words[bench_words.index("--config") + 1]), bench_words[bench_words.index("--cache") + 1]
    full, quick = read_settings(config, quick=False), read_settings(config, quick=True)
    settings = tiny(full, quick)
    nets = {name for name, its in full.methods.items() if its.fit and name != "scratch"}
    cells = [cell for cell in list_cells(settings, cache, tmp_path) if not cell.fold]
    found = figures_of(settings, cache, [cell for cell in cells if cell.method not in nets])
    common = quick.fit_common[quick.fit_common.index("--model.crop_vox") :]  # an encoder is what a U-Net has not
    if "--model.feature_size" in common:
        place = common.index("--model.feature_size")
        common = [*common[:place], "--model.channels", "[4,8]", *common[place + 2 :]]
    settings = replace(settings, fit_common=[*common, "--data.num_workers", "0", "--trainer.precision", "32-true"])
    cells = [cell for cell in list_cells(settings, cache, tmp_path) if not cell.fold]
    found |= figures_of(settings, cache, [cell for cell in cells if cell.method in nets])
    assert found.keys() == KINDS[config.stem]
    trained = [subjects.keys() for (_, name), subjects in found.items() if full.readouts[name].probe is None]
    probed = [subjects.keys() for (_, name), subjects in found.items() if full.readouts[name].probe is not None]
    assert trained[0] and all(names == trained[0] for names in trained)
    assert all(names == probed[0] >= trained[0] for names in probed), (
        "trained tasks are measured on one volume or eight"
    )
    assert all(0 <= sum(one.values()) / len(one) <= 1 for one in found.values())


@pytest.mark.slow
def test_adni__smallest_amount__every_draw_has_both_classes_and_is_measured(
    tmp_path: Path, make_cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    splits = ["train"] * 150 + ["test"] * 4
    cache = str(make_cache(tmp_path / "c.h5", 154, (18, 18, 18), labelled=False, splits=splits))
    path = ROOT / "conf" / "bench" / "adni.yaml"
    full, quick = read_settings(path, quick=False), read_settings(path, quick=True)
    assert full.labels[0] == "1%"
    settings = replace(tiny(full, quick), labels=["1%"], draws=full.draws)
    cells = [cell for cell in list_cells(settings, cache, tmp_path / "out") if cell.method == "scratch"]
    job = Job(settings, cache, "c")
    for cell in cells:
        if cell.fit and (cell.readout == "finetune" or cell.draw == 0):
            row = train_and_measure(cell, job)
            assert len(row["subjects"]) == 4 and row["labels"] == "1%"
    assert {cell.draw for cell in cells} == set(range(5))


@pytest.mark.slow
@pytest.mark.parametrize("path", BENCHES, ids=lambda path: path.stem)
def test_full_form__every_kind_of_command_builds(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    settings = read_settings(path, quick=False)
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for cell in list_cells(settings, "c.h5", tmp_path):
        if cell.pretraining is None and cell.fit:
            found.setdefault((cell.method, cell.readout), cell.fit)
        elif cell.pretraining is not None and cell.pretraining.command:
            found.setdefault((cell.method, "pretraining"), cell.pretraining.command)
    trains = any(one.fit for one in settings.readouts.values())
    ours = {name for name, its in settings.methods.items() if its.time_of is None and (its.pretrain or trains)}
    assert {name for name, _ in found} == ours
    for (name, _), words in found.items():
        fit = ParsedFit(list(words[1:]))
        fit.build()
        if path.stem in PUBLIC and name == "scratch" and not fit.model.freeze_encoder:
            rates = {group["lr"] for group in fit.model.parameter_groups() if group["name"].startswith("layer")}
            assert len(rates) == 1, "a decay over layers is for pretrained ones"
        assert type(fit.model).__name__ in (
            "AGSSD",
            "MAE",
            "IBOT",
            "RegionContrast",
            "SegmentationTask",
            "ClassificationTask",
            "UNetTask",
        )


def test_docs__list_every_bench_once_and_show_two_that_can_be_read(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "bench.md").read_text()
    rows = text.split("| `conf/bench/` | task | data |\n")[1].split("\n\n")[0].splitlines()[1:]
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(listed) == [path.stem for path in BENCHES]
    folder = tmp_path / "conf" / "bench"
    folder.mkdir(parents=True)
    for name in ("base", "../experiment", "../method", "../backbone", "../cluster", "../views"):
        (folder / name).resolve().symlink_to(ROOT / "conf" / "bench" / name)
    path = folder / "mine.yaml"
    on_gpus, small = re.findall("```yaml\n(.*?)```", text, re.DOTALL)
    path.write_text(on_gpus)
    settings = read_settings(path, quick=False)
    assert list(settings.methods) == ["scratch", "agssd", "mae", "unet"] and "frozen" not in settings.readouts
    assert settings.labels_of("finetune") == [5, "100%"] and settings.pretrain_steps == 10000
    assert list(read_settings(path, quick=True).methods) == ["scratch", "agssd"]
    path.write_text(small)
    settings = read_settings(path, quick=False)
    assert {"scratch", "mine", "elsewhere", "unet"} < set(settings.methods) and "mine-equal-time" in settings.methods
    assert (
        settings.leader == "mine"
        and settings.labels == [2, 4, "10%", "100%"]
        and settings.readouts["finetune"].steps == [200, 600]
    )
