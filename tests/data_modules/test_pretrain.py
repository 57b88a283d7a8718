"""The pretraining data module: batches, cuts over ranks, resume, and every refusal."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from agssd.data_modules.agreement import cache_contract
from agssd.data_modules.cache import VolumeCache
from agssd.data_modules.downstream import SegmentationDataModule
from agssd.data_modules.pretrain import PretrainDataModule
from agssd.scans.preparing import volumes as scans

PARENT = (32, 40, 32)
SpoilCache = Callable[[Path, list[str], Path], Path]


def module(cache: Path | list[str], trainer: Any = None, **changes: Any) -> PretrainDataModule:
    settings: dict[str, Any] = {"parent_vox": PARENT, "global_batch_size": 4, "num_workers": 0} | changes
    paths = cache if isinstance(cache, list) else str(cache)
    data = PretrainDataModule(paths, **settings)
    data.trainer = trainer
    return data


def fake_trainer(rank: int = 0, world: int = 1, accumulate: int = 1, step: int = 0, max_steps: int = 10) -> Any:
    return SimpleNamespace(
        global_rank=rank,
        world_size=world,
        accumulate_grad_batches=accumulate,
        global_step=step,
        max_steps=max_steps,
        default_root_dir="never written",
        training=True,
    )


def batches(data: PretrainDataModule, count: int) -> list[dict[str, torch.Tensor]]:
    data.setup("fit")
    loader: Any = data.train_dataloader()
    try:
        return list(islice(iter(loader), count))
    finally:
        if loader._iterator is not None:  # collected together with its queues it would wait for its workers in vain
            loader._iterator._shutdown_workers()


def test_train_dataloader__delivers_parent_batches_as_stored(tiny_cache: Path) -> None:
    (batch,) = batches(module(tiny_cache), 1)
    assert batch["image"].shape == (4, 1, *PARENT) and batch["image"].dtype == torch.int16
    assert batch["foreground"].shape == (4, 1, *PARENT) and batch["foreground"].dtype == torch.uint8
    for name in ("scale", "offset", "low", "high", "edge_q99"):
        assert batch[name].shape == (4, 1) and batch[name].dtype == torch.float32
    assert batch["is_ct"].dtype == torch.bool and not batch["is_ct"].any()
    assert batch["spacing_mm"].tolist() == [[1.0, 1.0, 1.0]] * 4
    assert batch["sample"].tolist() == [0, 1, 2, 3]


def test_dataloaders__workers_start_without_a_draw_from_the_global_random_state(tiny_cache: Path) -> None:
    data = module(tiny_cache, num_workers=1)
    data.setup("fit")
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert loader.num_workers == 1 and next(iter(loader))["image"].shape[0] == 4  # type: ignore[union-attr]
    assert torch.equal(torch.get_rng_state(), before)


def test_train_dataloader__voxels_are_those_of_the_cache(tiny_cache: Path) -> None:
    data = module(tiny_cache, prob_foreground=0.5)
    (batch,) = batches(data, 1)
    cache = VolumeCache(tiny_cache)
    for i in range(4):
        case = cache.select(split="train")[int(batch["case"][i])]
        whole, crop = cache.read_whole(case), batch["image"][i].numpy()
        places = np.lib.stride_tricks.sliding_window_view(whole, PARENT, axis=(1, 2, 3))
        found = np.argwhere((places == crop[:, None, None, None]).all(axis=(0, -3, -2, -1)))
        assert len(found) == 1
        centre = found[0] + np.array(PARENT) / 2 - np.array(whole.shape[1:]) / 2
        assert batch["centre_mm"][i].tolist() == centre.tolist()  # spacing 1 mm


def test_train_dataloader__only_the_train_split_with_equal_weight(tiny_cache: Path) -> None:
    data = module(tiny_cache)
    drawn = torch.cat([b["case"] for b in batches(data, 5)])  # 20 samples = 4 passes over 5 cases
    assert torch.bincount(drawn).tolist() == [4] * 5
    assert data.train_crops is not None
    assert {data.train_crops.info(int(row)).split for row in drawn} == {"train"}


MIXED = {"weights": [3.0, 1.0]}


@pytest.fixture(scope="module")
def two_caches(tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., Path]) -> list[str]:
    """Return a cache of 5 training cases and one of 2."""
    folder = tmp_path_factory.mktemp("two")
    shapes = [(40, 56, 40), (36, 44, 52)]
    paths = [
        make_cache(folder / f"{n}.h5", cases, shape, splits=["train"] * cases, seed=10 * n)
        for n, (cases, shape) in enumerate(zip((5, 2), shapes, strict=True))
    ]
    return [str(path) for path in paths]


def digest(parts: list[dict[str, torch.Tensor]]) -> str:
    """Return a hash over every tensor of batches."""
    found = hashlib.sha256()
    for part in parts:
        for name in sorted(part):
            found.update(name.encode() + part[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def global_batches(
    paths: list[str], steps: int, world: int = 1, accumulate: int = 1, first: int = 0, **changes: Any
) -> list[dict[str, torch.Tensor]]:
    """Return whole batches of 8 samples, joined from all ranks and accumulated batches in the order of samples."""
    ranks = [
        batches(
            module(paths, fake_trainer(rank, world, accumulate, first), global_batch_size=8, **changes),
            steps * accumulate,
        )
        for rank in range(world)
    ]
    joined = [part for parts in zip(*ranks, strict=True) for part in parts]
    cut = world * accumulate
    return [
        {name: torch.cat([part[name] for part in joined[n * cut : (n + 1) * cut]]) for name in joined[0]}
        for n in range(steps)
    ]


@pytest.mark.parametrize("mixing", [{}, MIXED, {"temperature": 3.0}])
def test_stream__one_hash_for_every_number_of_workers_ranks_and_accumulated_batches(
    two_caches: list[str], mixing: dict[str, Any]
) -> None:
    alone = global_batches(two_caches, 3, **mixing)
    assert torch.cat([batch["sample"] for batch in alone]).tolist() == list(range(24))
    wanted = digest(alone)
    for workers, world, accumulate in [(1, 1, 1), (2, 1, 1), (4, 1, 1), (0, 2, 1), (2, 2, 1), (4, 2, 2)]:
        cut = global_batches(two_caches, 3, world, accumulate, num_workers=workers, **mixing)
        assert digest(cut) == wanted, f"{workers} workers, {world} ranks, {accumulate} accumulated"
    assert digest(global_batches(two_caches, 3, seed=1, **mixing)) != wanted


@pytest.mark.parametrize("mixing", [{}, MIXED])
def test_stream__resumed_at_a_random_step__goes_on_exactly(two_caches: list[str], mixing: dict[str, Any]) -> None:
    whole = global_batches(two_caches, 12, **mixing)
    for first in np.random.default_rng(0).integers(1, 11, 3).tolist():
        rest = global_batches(two_caches, 12 - first, 2, first=first, num_workers=2, **mixing)
        assert digest(rest) == digest(whole[first:])


def test_stream__any_sample_alone__is_what_the_stream_holds(two_caches: list[str]) -> None:
    whole = global_batches(two_caches, 4, **MIXED)
    data = module(two_caches, **MIXED)
    data.setup("fit")
    assert data.train_crops is not None
    for sample in np.random.default_rng(1).permutation(32)[:9].tolist():
        alone = data.train_crops[sample]
        assert all(torch.equal(whole[sample // 8][name][sample % 8], alone[name]) for name in alone)


def test_stream_figures__samples_and_passes_of_each_cache(two_caches: list[str]) -> None:
    data = module(two_caches, **MIXED)
    data.setup("fit")
    drawn = torch.cat([batch["case"] for batch in global_batches(two_caches, 5, **MIXED)])
    counts = [int((drawn < 5).sum()), int((drawn >= 5).sum())]
    assert min(counts) > 0
    assert data.stream_figures(40) == {
        "data/source0_samples": counts[0],
        "data/source0_passes": counts[0] / 5,
        "data/source1_samples": counts[1],
        "data/source1_passes": counts[1] / 2,
    }
    assert data.stream_figures(10_000)["data/source0_samples"] == 7500


@pytest.mark.parametrize("changed", [{"weights": [1.0, 1.0]}, {"temperature": 2.0}, {}])
def test_load_state_dict__refuses_other_shares(two_caches: list[str], changed: dict[str, Any]) -> None:
    before, after = module(two_caches, **MIXED), module(two_caches, **changed)
    for data in (before, after):
        data.setup("fit")
    before.load_state_dict(before.state_dict())
    with pytest.raises(ValueError, match=r"samples_per_cache_and_block was \[7500, 2500\]"):
        after.load_state_dict(before.state_dict())
    early = {name: value for name, value in before.state_dict().items() if name in ("seed", "num_cases")}
    if changed:  # a checkpoint without the entry knew no shares
        with pytest.raises(ValueError, match="samples_per_cache_and_block was None"):
            after.load_state_dict(early)
    else:
        after.load_state_dict(early)


def test_load_state_dict__refuses_another_fold(tiny_cache: Path) -> None:
    before, after = (module(tiny_cache, num_folds=5, fold=fold) for fold in (0, 1))
    for data in (before, after):
        data.setup("fit")
    with pytest.raises(ValueError, match=r"fold was \[5, 0\], is \[5, 1\]"):
        after.load_state_dict(before.state_dict())


def test_load_state_dict__refuses_exchanged_caches(two_caches: list[str]) -> None:
    before, after = module(two_caches), module(two_caches[::-1])
    for data in (before, after):
        data.setup("fit")
    with pytest.raises(ValueError, match=r"cases_per_cache was \[5, 2\], is \[2, 5\]"):
        after.load_state_dict(before.state_dict())


def test_fold__left_out_by_subject_as_the_downstream_modules_cut_it(
    make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    labelled = make_cache(
        tmp_path / "a.h5", 14, cases_per_subject=2, shape=(20, 20, 20), splits=["train"] * 6 + ["val"]
    )
    plain = make_cache(tmp_path / "b.h5", 3, shape=(20, 20, 20), labelled=False, num_classes=0, splits=["train"] * 3)
    rewritten(plain, lambda row, case: {"subject": f"other{row}"})
    held = []
    for fold in range(3):
        data = module([str(labelled), str(plain)], num_folds=3, fold=fold, parent_vox=(16, 16, 16))
        data.setup("fit")
        down = SegmentationDataModule(
            [str(labelled), str(plain)], crop_vox=(16, 16, 16), num_classes=3, num_folds=3, fold=fold
        )
        down.setup("fit")
        assert data.train_crops is not None
        seen = {data.train_crops.info(row).subject for row in range(len(data.train_crops.rows))}
        out = {down.case_info(row).subject for row in down.members["val"]}
        assert len(out) == 2 and not seen & out
        assert seen | out == {f"subject{n:03d}" for n in range(6)} | {f"other{n}" for n in range(3)}
        held += sorted(out)
    assert sorted(held) == [f"subject{n:03d}" for n in range(6)]


def drawn_cases(data: PretrainDataModule, count: int) -> list[int]:
    assert data.train_crops is not None
    return [data.train_crops.row_of(sample) for sample in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_case__stops_with_its_name(
    tiny_cache: Path, tmp_path: Path, spoil_cache: SpoilCache, workers: int
) -> None:
    path = spoil_cache(tiny_cache, ["case002"], tmp_path / "broken.h5")
    with pytest.raises(ValueError, match=r"broken\.h5: cannot read image of case case002"):
        batches(module(path, num_workers=workers), 3)


def test_quarantine__replaced_within_the_source_counted_listed_and_warned_of_once(
    two_caches: list[str], tmp_path: Path, spoil_cache: SpoilCache, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [str(spoil_cache(Path(two_caches[0]), ["case001", "case003"], tmp_path / "a.h5")), two_caches[1]]
    good = global_batches(two_caches, 3, **MIXED)
    trainer = fake_trainer()
    trainer.default_root_dir = str(tmp_path / "run")
    data = module(paths, trainer, global_batch_size=8, on_broken="quarantine", **MIXED)
    with caplog.at_level(logging.WARNING):
        found = [data.on_before_batch_transfer(batch, 0) for batch in batches(data, 3)]
    drawn = drawn_cases(data, 24)
    met = [sample for sample in range(24) if drawn[sample] in (1, 3)]
    assert len(met) > 3 and {drawn[sample] for sample in met} == {1, 3}
    for sample in range(24):
        batch, row = found[sample // 8], sample % 8
        if sample in met:
            assert batch["broken"][row, 0] == drawn[sample] and int(batch["case"][row]) in (0, 2, 4)
            assert set(batch["broken"][row].tolist()) <= {1, 3, -1}
        else:
            assert all(torch.equal(batch[name][row], good[sample // 8][name][row]) for name in batch)
    assert data.quarantine is not None and data.quarantine.num_replaced == len(met)
    listed = (tmp_path / "run" / "quarantine.csv").read_text().splitlines()
    assert listed[0] == "case,cache,first_sample"
    assert sorted(line.split(",")[0] for line in listed[1:]) == ["case001", "case003"]
    assert f"{VolumeCache(paths[0]).cases[drawn[met[0]]].key},0,{met[0]}" in listed
    for key in ("case001", "case003"):
        assert caplog.text.count(f"case {key} of cache number 0") == 1
    again = module(paths, trainer, global_batch_size=8, on_broken="quarantine", **MIXED)
    for batch in batches(again, 3):
        again.on_before_batch_transfer(batch, 0)
    assert (tmp_path / "run" / "quarantine.csv").read_text().splitlines() == listed  # resumed: not listed twice


def test_quarantine__the_stream_is_one_for_all_workers_and_ranks(
    two_caches: list[str], tmp_path: Path, spoil_cache: SpoilCache
) -> None:
    paths = [str(spoil_cache(Path(two_caches[0]), ["case001", "case003"], tmp_path / "a.h5")), two_caches[1]]
    settings = {"on_broken": "quarantine", **MIXED}
    wanted = digest(global_batches(paths, 3, **settings))
    assert digest(global_batches(paths, 3, 2, num_workers=2, **settings)) == wanted
    assert digest(global_batches(two_caches, 3, **settings)) != wanted


def test_quarantine__a_source_that_is_all_broken__stops(
    two_caches: list[str], tmp_path: Path, spoil_cache: SpoilCache
) -> None:
    paths = [two_caches[0], str(spoil_cache(Path(two_caches[1]), ["case000", "case001"], tmp_path / "b.h5"))]
    with pytest.raises(ValueError, match="2 cases drawn for one sample cannot be read.*check the disk.*case00[01]"):
        global_batches(paths, 3, on_broken="quarantine", weights=[1.0, 1.0])


def test_train_dataloader__pads_with_the_lowest_value_and_no_foreground(
    make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_cache(tmp_path / "small.h5", shape=(30, 40, 32))
    (batch,) = batches(module(path), 1)
    assert (batch["foreground"][:, :, [0, -1]] == 0).all()
    lowest = batch["image"].flatten(1).min(1).values
    assert (batch["image"][:, 0, 0] == lowest[:, None, None]).all()


def test_setup__two_caches_are_concatenated(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    a = make_cache(tmp_path / "a.h5", num_cases=2, splits=["train", "train"])
    b = make_cache(tmp_path / "b.h5", num_cases=3, splits=["train"] * 3, modality="ct", seed=50)
    data = module([str(a), str(b)], global_batch_size=5)
    (batch,) = batches(data, 1)
    assert sorted(batch["case"].tolist()) == [0, 1, 2, 3, 4]
    assert torch.equal(batch["is_ct"], batch["case"] >= 2)
    assert data.contract["modality"] == "mixed"
    assert set(data.contract["intensity"]) == {"ct", "mri"}


def test_val_dataloader__is_one_fixed_pass_that_no_cut_changes(tiny_cache: Path) -> None:
    def draw(rank: int, world: int) -> list[dict[str, torch.Tensor]]:
        data = module(tiny_cache, fake_trainer(rank, world))
        data.setup("fit")
        return list(data.val_dataloader())

    first, again = draw(0, 1), draw(0, 1)
    assert len(first) == 1  # 2 cases, global batch 4
    assert torch.equal(first[0]["image"], again[0]["image"])
    assert set(first[0]["case"].tolist()) == {0, 1}
    joined = torch.cat([draw(rank, 2)[0]["image"] for rank in range(2)])
    assert torch.equal(joined, first[0]["image"])


def test_val_dataloader__none_without_a_val_split(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    data = module(make_cache(tmp_path / "a.h5", num_cases=2, splits=["train", "train"]))
    data.setup("fit")
    assert data.val_dataloader() == []


def test_dataset__survives_pickling(tiny_cache: Path) -> None:
    data = module(tiny_cache)
    data.setup("fit")
    assert data.train_crops is not None
    copy = pickle.loads(pickle.dumps(data.train_crops))
    assert torch.equal(copy[3]["image"], data.train_crops[3]["image"])


def test_contract__is_plain_and_complete(tiny_cache: Path) -> None:
    data = module(tiny_cache)
    data.setup("fit")
    assert data.contract == {
        "spacing_mm": [1.0, 1.0, 1.0],
        "orientation": "SAR",
        "modality": "mri",
        "intensity": {"mri": {"rule": "foreground_percentiles", "percentiles": [0.05, 99.95], "range": [-1.0, 1.0]}},
        "channels": 1,
    }


def test_contract__states_the_constants_that_the_scans_were_prepared_with(tiny_cache: Path) -> None:
    info = VolumeCache(tiny_cache).cases[0]
    rules = cache_contract([info, replace(info, modality="ct")])["intensity"]
    assert (rules["ct"]["low"], rules["ct"]["high"]) == scans.CT_RANGE_HU
    assert rules["mri"]["percentiles"] == list(scans.MRI_PERCENTILES)


def test_state_dict__is_plain_and_knows_the_samples_seen(tiny_cache: Path, tmp_path: Path) -> None:
    data = module(tiny_cache, fake_trainer(step=7))
    data.setup("fit")
    torch.save(data.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["samples_seen"] == 28


def test_load_state_dict__refuses_another_stream(tiny_cache: Path) -> None:
    data = module(tiny_cache, fake_trainer(step=1))
    data.setup("fit")
    state = data.state_dict()
    data.load_state_dict(state)
    other = module(tiny_cache, fake_trainer(step=1), seed=5, global_batch_size=2)
    other.setup("fit")
    with pytest.raises(ValueError, match="seed was 0, is 5; global_batch_size was 4, is 2"):
        other.load_state_dict(state)


def test_setup__refuses_caches_of_other_spacing_naming_both(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    a = make_cache(tmp_path / "a.h5", num_cases=2)
    b = make_cache(tmp_path / "b.h5", num_cases=2, spacing_mm=(1.5, 1.5, 1.5))
    with pytest.raises(ValueError, match=r"spacing: .*a\.h5.*b\.h5.*--spacing-mm"):
        module([str(a), str(b)]).setup("fit")


def rewritten(path: Path, change: Callable[[int, Any], Any], fingerprint: str | None = None) -> Path:
    """Return the cache with its cases changed by ``change(row, case)`` and with a fingerprint of its salt."""
    with h5py.File(path, "r+") as file:
        index = json.loads(file["index"][()].tobytes())
        index["cases"] = [case | change(row, case) for row, case in enumerate(index["cases"])]
        del file["index"]
        file["index"] = np.frombuffer(json.dumps(index).encode(), dtype=np.uint8)
        if fingerprint is not None:
            file.attrs["salt_fingerprint"] = fingerprint
    return path


def test_setup__accepts_every_spacing_that_prepare_keeps(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    for name, target in (("fine", 0.4), ("coarse", 3.0)):
        sizes = [target * (1 - 0.99e-3), target, target * (1 + 0.99e-3)]
        path = make_cache(tmp_path / f"{name}.h5", num_cases=3, splits=["train"] * 3)
        rewritten(path, lambda row, case, sizes=sizes: {"spacing_mm": [sizes[row]] * 3})
        module([str(path)], global_batch_size=3).setup("fit")


def test_setup__spacings_inside_one_cache_are_refused_with_a_remedy_for_it(
    make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    path = rewritten(make_cache(tmp_path / "a.h5", num_cases=2), lambda row, case: {"spacing_mm": [1.0, 1.0, 1 + row]})
    with pytest.raises(ValueError, match=r"the cases of .*a\.h5 disagree in spacing: .*prepare it again") as error:
        module(path).setup("fit")
    assert str(error.value).count("a.h5") == 1 and "both" not in str(error.value)


@pytest.mark.parametrize("joined", [False, True])
def test_setup__spacings_of_two_modalities_are_refused_with_a_remedy_for_them(
    make_cache: Callable[..., Path], tmp_path: Path, joined: bool
) -> None:
    paths = [make_cache(tmp_path / "a.h5", num_cases=2)]
    if joined:
        paths.append(make_cache(tmp_path / "b.h5", num_cases=2, modality="ct", spacing_mm=(1.5, 1.5, 1.5)))
    else:
        rewritten(paths[0], lambda row, case: {"modality": "ct", "spacing_mm": [1.5] * 3} if row else {})
    with pytest.raises(ValueError, match=r"mri\) has .*ct\) has .*once per --modality.*or give all one --spacing-mm"):
        module([str(path) for path in paths]).setup("fit")


@pytest.mark.parametrize(
    ("fingerprints", "warned"),
    [(("a", "a"), False), (("a", "b"), True), (("a", None), True), ((None, None), True), ((None,), False)],
)
def test_setup__caches_of_different_or_unknown_salts_are_warned_of_once(
    make_cache: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    fingerprints: tuple[str | None, ...],
    warned: bool,
) -> None:
    paths = [
        rewritten(make_cache(tmp_path / f"{row}.h5", num_cases=2, splits=["train"] * 2), lambda *_: {}, fingerprint)
        for row, fingerprint in enumerate(fingerprints)
    ]
    data = module([str(path) for path in paths])
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
        data.setup("validate")
    said = [record.getMessage() for record in caplog.records if "cannot be matched" in record.getMessage()]
    assert len(said) == warned
    assert all("agssd prepare --salt FILE" in text and "0.h5" in text for text in said)


def test_setup__a_person_in_two_splits_of_joined_caches_is_warned_of(
    make_cache: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [
        rewritten(make_cache(tmp_path / f"{row}.h5", num_cases=2, splits=["train", last]), lambda *_: {}, "a")
        for row, last in enumerate(("train", "test"))
    ]
    with caplog.at_level(logging.WARNING):
        module([str(path) for path in paths]).setup("fit")
    assert "1 subjects are in different splits" in caplog.text and "subject001 (test, train)" in caplog.text


def test_setup__refuses_caches_of_other_channels_naming_both(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    a = make_cache(tmp_path / "a.h5", num_cases=2)
    b = make_cache(tmp_path / "b.h5", num_cases=2, channels=2)
    with pytest.raises(ValueError, match=r"channels: .*a\.h5.* has 1, .*b\.h5.* has 2"):
        module([str(a), str(b)]).setup("fit")


def test_setup__refuses_missing_and_truncated_caches(tiny_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.h5"):
        module(tmp_path / "gone.h5").setup("fit")
    torn = tmp_path / "torn.h5"
    torn.write_bytes(tiny_cache.read_bytes()[: os.path.getsize(tiny_cache) // 2])
    with pytest.raises(ValueError, match=r"torn\.h5"):
        module(torn).setup("fit")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(ValueError, match=r"foreign\.h5"):
        module(tmp_path / "foreign.h5").setup("fit")


def test_setup__refuses_a_parent_that_is_mostly_padding(tiny_cache: Path) -> None:
    with pytest.raises(ValueError, match=r"parent_vox \[160, 160, 160\] is too large"):
        module(tiny_cache, parent_vox=(160, 160, 160)).setup("fit")


def test_setup__refuses_a_cache_without_training_cases(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    path = make_cache(tmp_path / "a.h5", num_cases=2, splits=["train", "train"])
    with h5py.File(path, "r+") as file:
        text = file["index"][()].tobytes().replace(b'"train"', b'"valid"')
        file["index"][...] = np.frombuffer(text, dtype=file["index"].dtype)
    with pytest.raises(ValueError, match="no case of the split 'train'"):
        module(path).setup("fit")


def test_setup__refuses_an_endless_run_and_a_remainder(tiny_cache: Path) -> None:
    with pytest.raises(ValueError, match="max_steps"):
        module(tiny_cache, fake_trainer(max_steps=-1)).setup("fit")
    with pytest.raises(ValueError, match="global_batch_size 4 cannot be divided by 3 device"):
        module(tiny_cache, fake_trainer(world=3)).setup("fit")


@pytest.mark.parametrize(
    "changes",
    [
        {"parent_vox": (0, 8, 8)},
        {"seed": -1},
        {"prob_foreground": 1.5},
        {"num_workers": -1},
        {"prefetch": 0},
        {"weights": [1.0], "temperature": 2.0},
        {"num_folds": 3},
        {"fold": 3, "num_folds": 3},
    ],
)
def test_init__refuses_impossible_settings(tiny_cache: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"data.{next(iter(changes))}"):
        module(tiny_cache, **changes)


@pytest.mark.parametrize(
    ("differing", "changed"),
    [("cases", {"key": "f" * 16}), ("preparation", {"low": (0.25,)}), ("preparation", {"source_sha256": "f" * 64})],
)
def test_resume__a_cache_that_was_built_anew_at_the_same_place_is_refused(
    differing: str, changed: dict[str, Any], tiny_cache: Path
) -> None:
    data = module(tiny_cache)
    data.setup("validate")
    state = data.state_dict()
    assert data.train_crops is not None
    first = data.train_crops.caches[0]
    first.cases = (replace(first.cases[0], **changed), *first.cases[1:])
    with pytest.raises(ValueError, match=f"another stream of samples: {differing} was"):
        data.load_state_dict(state)
    data.load_state_dict({name: value for name, value in state.items() if name != differing})  # an early checkpoint


def test_on_exception__bus_error_of_a_worker_is_explained(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    data = module(tmp_path / "c.h5")
    data.on_exception(RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."))
    assert "agssd doctor CACHE" in caplog.text
    caplog.clear()
    data.on_exception(RuntimeError("out of memory"))
    assert not caplog.text
