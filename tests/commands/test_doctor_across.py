"""Comparing cases: label values, subjects, classes and handedness of made-up indices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from agssd.commands.doctor.across import Member, check_source
from agssd.data_modules.cache import CaseInfo

LPS = ((-1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))


def _members(count: int = 20, **fields: object) -> list[Member]:
    """Return cases that have nothing wrong, each of its own subject."""
    identity = tuple(map(tuple, np.eye(4).tolist()))
    info = CaseInfo(
        key="",
        subject="",
        split="",
        modality="mri",
        shape=(40, 40, 40),
        channels=1,
        spacing_mm=(1.0, 1.0, 1.0),
        affine=identity,
        source_shape=(40, 40, 40),
        source_affine=identity,
        source_sha256="",
        scale=(1.0,),
        offset=(0.0,),
        low=(0.0,),
        high=(1.0,),
        fill=(0,),
        edge_q99=(1.0,),
        foreground_fraction=0.5,
        foreground_box=((0, 40), (0, 40), (0, 40)),
        label_values=(0, 1, 2),
    )
    return [
        Member(row, f"p{row}", replace(info, subject=f"s{row}", source_sha256=str(row), **fields), None)
        for row in range(1, count + 1)
    ]


def _change(members: list[Member], rows: range | list[int], **fields: object) -> list[Member]:
    return [
        member._replace(info=replace(member.info, **fields)) if member.number in rows else member for member in members
    ]


def _kinds(members: list[Member], known: tuple[int, ...] | None = None) -> list[tuple[int, str, str]]:
    return [(number, finding.check, finding.severity) for number, finding in check_source(members, known)]


@pytest.mark.parametrize("count", [1, 5, 50])
def test_check_source__nothing_wrong(count: int) -> None:
    assert _kinds(_members(count), (0, 1, 2)) == []
    assert _kinds(_members(count)) == []


def test_check_source__rare_label_values() -> None:
    members = _change(_members(60), [7, 9], label_values=(0, 1, 4))
    assert _kinds(members) == [(7, "label-values", "warning"), (9, "label-values", "warning")]
    assert _kinds(_change(_members(60), [7, 9, 11, 13], label_values=(0, 1, 4))) == []
    organs = _change(_members(60, label_values=tuple(range(100))), [3], label_values=(0, 1, 117))
    assert _kinds(organs) == [(3, "label-values", "info")]
    assert _kinds(_change(_members(60), [3], label_values=(0, 3, 4, 5, 6))) == [(3, "label-values", "info")]
    assert _kinds(_change(_members(5), [2], label_values=(0, 7))) == []  # too few to say what is rare


def test_check_source__label_values_with_gaps() -> None:
    assert _kinds(_members(4, label_values=(0, 255))) == [(0, "label-values", "warning")]
    assert _kinds(_members(4, label_values=(0, 255)), (255,)) == []


def test_check_source__subject_with_many_scans() -> None:
    assert _kinds(_change(_members(40), range(5, 16), subject="one")) == [(5, "subject", "warning")]
    assert _kinds(_change(_members(40), range(5, 15), subject="one")) == []
    pairs = [member._replace(info=replace(member.info, subject=str(member.number // 12))) for member in _members(60)]
    assert _kinds(pairs) == []


def test_check_source__handedness_of_few() -> None:
    assert _kinds(_members(20, source_affine=LPS)) == []
    assert _kinds(_change(_members(20), [4, 8], source_affine=LPS)) == [
        (4, "mirrored", "info"),
        (8, "mirrored", "info"),
    ]
    assert _kinds(_change(_members(20), range(1, 9), source_affine=LPS)) == [(0, "mirrored", "info")]
    found = check_source(_change(_members(20), range(1, 18), source_affine=LPS), None)
    assert [number for number, _ in found] == [18, 19, 20]
    assert "right-handed axes (positive determinant), the others left-handed" in found[0][1].message


def test_check_source__classes() -> None:
    def named(counts: dict[str, int], split: str = "") -> list[Member]:
        names = [name for name, count in counts.items() for _ in range(count)]
        members = _members(len(names), split=split)
        return [member._replace(class_name=name) for member, name in zip(members, names, strict=True)]

    assert _kinds(named({"ill": 10, "well": 12})) == [(0, "class-balance", "info")]
    assert _kinds(named({"ill": 3, "well": 90})) == [(0, "class-balance", "warning")]
    assert _kinds(named({"ill": 2, "well": 12}))[0] == (0, "class-balance", "warning")
    assert _kinds(named({"ill": 5, "well": 12}, "test"))[0] == (0, "class-balance", "error")
    for _, finding in check_source(named({"ill": 2, "well": 90}), None):
        assert "ill" not in finding.message and "ill" in finding.text


def test_check_source__near_duplicates_name_their_nearest_twin() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (20, 64), dtype=np.uint8)
    hashes[9] = hashes[4]
    hashes[9, 0] ^= 3
    hashes[14] = hashes[9]
    members = [
        member._replace(info=replace(member.info, perceptual_hash=code.tobytes().hex()))
        for member, code in zip(_members(20), hashes, strict=True)
    ]
    found = check_source(members, None)
    assert [(number, finding.severity) for number, finding in found] == [(10, "warning"), (15, "warning")]
    assert "510 of 512 bits of its hash are those of #5." in found[0][1].message
    assert "512 of 512 bits of its hash are those of #10." in found[1][1].message
    assert [item[2] for item in _kinds(_change(members, [5, 10, 15], subject="one"))] == ["info", "info"]
    found = check_source(_change(_change(members, range(1, 15), split="train"), [15], split="test"), None)
    assert [finding.severity for _, finding in found] == ["warning", "error"]
    assert "one is in test, the other in train" in found[1][1].message
