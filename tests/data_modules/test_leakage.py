"""Subjects and copies of scans that an encoder has seen are found, and what cannot be compared is said."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from agssd.data_modules.cache import CaseInfo, VolumeCache
from agssd.data_modules.downstream import SegmentationDataModule
from agssd.data_modules.leakage import check_leakage, overlap, record_after, seen_record
from agssd.data_modules.pretrain import PretrainDataModule
from agssd.hub import export_backbone
from agssd.models.vit import ViT
from agssd.scans.preparing.perceptual import NUM_BITS
from agssd.tasks.encoders import load_encoder
from agssd.tasks.segmentation import SegmentationTask


@pytest.fixture(scope="module")
def info(tiny_cache: Path) -> CaseInfo:
    return VolumeCache(tiny_cache).cases[0]


def hashed(seed: int, flips: int = 0) -> str:
    """Return a hash that is a function of the seed, with so many bits flipped."""
    number = int.from_bytes(np.random.default_rng(seed).bytes(NUM_BITS // 8), "big")
    return f"{number ^ ((1 << flips) - 1):0{NUM_BITS // 4}x}"


def cache_of(info: CaseInfo, *cases: tuple[str, str | None], salt: str | None = "salt") -> Any:
    """Return what the check reads of a cache: (subject, hash) of each case, and the salt."""
    made = [replace(info, key=f"k{n}", subject=who, perceptual_hash=text) for n, (who, text) in enumerate(cases)]
    return SimpleNamespace(cases=made, salt_fingerprint=salt)


def rows(cache: Any) -> list[tuple[int, int]]:
    return [(0, row) for row in range(len(cache.cases))]


def contract(*caches: Any) -> dict[str, Any]:
    every = [(number, row) for number, cache in enumerate(caches) for row in range(len(cache.cases))]
    return {"seen": json.loads(json.dumps(seen_record(caches, every)))}


def test_overlap__subjects_by_key_and_scans_by_hash(info: CaseInfo) -> None:
    seen = contract(cache_of(info, ("a", hashed(0)), ("a", hashed(1)), ("b", None), ("c", hashed(2))))["seen"]
    assert (seen["num_cases"], seen["num_subjects"], seen["salts"]) == (4, 3, ["salt"])
    other = cache_of(info, ("a", hashed(9)), ("d", hashed(2, 20)), ("e", hashed(2, 200)), ("e", None), ("b", hashed(8)))
    found = overlap(seen, [other], rows(other))
    assert (found.subjects, found.duplicates) == (("a", "b"), {"k1": 20})
    assert (
        "2 of 4 subjects (for example a) and near duplicates of 1 further of 5 scans (for example case k1: 20"
        in str(found)
    )
    assert not overlap(seen, [other], [(0, 2), (0, 3)])


def test_overlap__a_sequence_is_known_by_any_of_its_frames(info: CaseInfo) -> None:
    seen = contract(cache_of(info, ("a", hashed(0) + hashed(1) + hashed(2))))["seen"]
    other = cache_of(info, ("b", hashed(7) + hashed(1, 9) + hashed(2, 5)), ("c", hashed(7)), ("d", None))
    assert overlap(seen, [other], rows(other)).duplicates == {"k0": 5}


def test_overlap__same_key_of_another_salt__is_another_subject(info: CaseInfo) -> None:
    seen = contract(cache_of(info, ("a", None), salt="one"))["seen"]
    for salt, same in (("one", True), ("two", False), (None, False)):
        other = cache_of(info, ("a", None), salt=salt)
        assert bool(overlap(seen, [other], rows(other))) == same


def test_seen_record__holds_no_key_and_100_000_cases_stay_small_and_quick(info: CaseInfo) -> None:
    rng = np.random.default_rng(0)
    cases = [(f"{n:016x}", rng.bytes(NUM_BITS // 8).hex()) for n in range(100_000)]
    cache, few = cache_of(info, *cases), cache_of(info, *cases[:200], ("x", hashed(3)))
    started = time.process_time()
    text = json.dumps(seen_record([cache], rows(cache)))
    found = overlap(json.loads(text), [few], rows(few))
    assert time.process_time() - started < 10
    assert len(text) < 11e6 and cases[70][0] not in text
    assert len(found.subjects) == 200 and not found.duplicates


def test_check_leakage__error_names_counts_split_example_and_remedy(
    info: CaseInfo, caplog: pytest.LogCaptureFixture
) -> None:
    known = contract(cache_of(info, ("a", hashed(0)), ("b", hashed(1))))
    cache = cache_of(info, ("c", hashed(5)), ("a", hashed(6)), ("d", hashed(1, 3)))
    splits = {"val": [(0, 0)], "test": [(0, 1), (0, 2)]}
    with caplog.at_level(logging.WARNING):
        with pytest.raises(ValueError) as error:
            check_leakage(known, "the encoder E", [cache], splits, "error")
        assert not caplog.records
        told = check_leakage(known, "the encoder E", [cache], splits, "warn")
    assert told == "seen of the split 'test' 1 of 2 subjects and near duplicates of 1 further of 2 scans", "no keys"
    message = str(error.value)
    assert "the encoder E has been trained on cases" in message and "'val'" not in message
    assert "of the split 'test' 1 of 2 subjects (for example a) and near duplicates of 1 further of 2 scans" in message
    assert "--data.leakage warn" in message and "data.fold" in message
    (record,) = caplog.records
    assert "of the split 'test' 1 of 2 subjects" in record.getMessage()


@pytest.mark.parametrize(
    ("seen", "other", "said"),
    [
        ({}, {}, None),
        ({"salt": "two"}, {}, "different or unknown salts"),
        ({"salt": None}, {"salt": None}, "different or unknown salts"),
        ({}, {"text": None}, "1 of 1 scans of val and test have no perceptual hash"),
        ({"text": None}, {}, "0 of 1 scans of val and test and all that it has seen have no perceptual hash"),
        ("nothing", {}, "carries no record of the cases"),
        ("fresh", {}, None),
    ],
)
def test_check_leakage__what_cannot_be_compared_is_said(
    info: CaseInfo, caplog: pytest.LogCaptureFixture, seen: Any, other: dict[str, Any], said: str | None
) -> None:
    def one(who: str, number: int, salt: str | None = "salt", text: str | None = "") -> Any:
        return cache_of(info, (who, hashed(number) if text == "" else text), salt=salt)

    known: Any = {"fresh": None, "nothing": {"modality": "mri"}}[seen] if isinstance(seen, str) else None
    if not isinstance(seen, str):
        known = contract(one("a", 0, **seen))
    with caplog.at_level(logging.WARNING):
        told = check_leakage(known, "E", [one("b", 1, **other)], {"val": [], "test": [(0, 0)]}, "error")
    assert len(caplog.records) == (said is not None) == bool(told)
    assert said is None or said in caplog.text
    assert said is None or said in told or "carries no record of what it has seen" in told


def test_record_after__further_training_adds_its_cases(info: CaseInfo) -> None:
    first, second = cache_of(info, ("a", hashed(0))), cache_of(info, ("b", hashed(1)), ("a", hashed(0)))
    joined = record_after(contract(first), [second], rows(second))
    assert joined is not None
    assert joined | {"num_cases": 2} == seen_record([second], rows(second)) and joined["num_cases"] == 3
    assert record_after(None, [second], rows(second)) == seen_record([second], rows(second))
    assert record_after({"modality": "ct"}, [second], rows(second)) is None  # a part would look like the whole


# ------------------------------------------------------------- from pretraining to a task


def pretrained(cache: Path, out: Path, **settings: Any) -> str:
    """Export an encoder as if it had been pretrained on the cache."""
    data = PretrainDataModule(str(cache), (16, 16, 16), 4, num_workers=0, **settings)
    data.setup("fit")
    vit = ViT(patch_size=8, embed_dim=12, depth=1, num_heads=2)
    export_backbone(vit, out, contract=data.contract | {"seen": data.seen})
    return str(out)


def set_up(cache: Path, encoder: str, stage: str = "fit", **settings: Any) -> None:
    task = SegmentationTask(backbone=None, encoder=encoder, num_classes=3, crop_vox=(16, 16, 16), decoder="linear")
    data = SegmentationDataModule(str(cache), global_batch_size=2, num_workers=0, **settings)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=task, max_steps=2, global_rank=0, world_size=1, accumulate_grad_batches=1
    )
    data.setup(stage)


def test_downstream__held_out_splits_pass_and_folds_of_what_was_seen_do_not(tiny_cache: Path, tmp_path: Path) -> None:
    encoder = pretrained(tiny_cache, tmp_path / "all")
    set_up(tiny_cache, encoder)
    set_up(tiny_cache, encoder, "test")
    with pytest.raises(ValueError, match=r"all has been trained on .* split 'val' 1 of 1 subjects .*data\.fold"):
        set_up(tiny_cache, encoder, num_folds=5, fold=2)
    set_up(tiny_cache, encoder, num_folds=5, fold=2, leakage="warn")
    set_up(tiny_cache, encoder, "predict", num_folds=5, fold=2)
    set_up(tiny_cache, pretrained(tiny_cache, tmp_path / "fold", num_folds=5, fold=2), num_folds=5, fold=2)
    with pytest.raises(ValueError, match="split 'val'"):
        set_up(tiny_cache, str(tmp_path / "fold"), num_folds=5, fold=3)


def test_downstream__test_subjects_in_another_cache_of_the_same_people(
    tiny_cache: Path, make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    unlabelled = make_cache(tmp_path / "b.h5", labelled=False, splits=["train"] * 8)
    encoder = pretrained(unlabelled, tmp_path / "e")
    for stage in ("fit", "validate", "test"):
        with pytest.raises(ValueError, match=r"'val' 2 of 2 subjects .*'test' 1 of 1 subjects \(for example subject0"):
            set_up(tiny_cache, encoder, stage)


def test_downstream__fine_tuned_encoder_carries_both_records(tiny_cache: Path, tmp_path: Path) -> None:
    import lightning.pytorch as L

    encoder = pretrained(tiny_cache, tmp_path / "fold", num_folds=5, fold=2)
    quiet = {name: False for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    for frozen, subjects in ((False, 5), (True, 4)):
        task = SegmentationTask(
            backbone=None,
            encoder=encoder,
            num_classes=3,
            crop_vox=(16, 16, 16),
            decoder="linear",
            freeze_encoder=frozen,
        )
        trainer = L.Trainer(
            accelerator="cpu", max_steps=1, limit_val_batches=0, default_root_dir=str(tmp_path), **quiet
        )
        trainer.fit(task, SegmentationDataModule(str(tiny_cache), global_batch_size=2, num_workers=0))
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        carried = load_encoder(tmp_path / "a.ckpt").contract
        assert carried is not None and carried["seen"]["num_subjects"] == subjects
