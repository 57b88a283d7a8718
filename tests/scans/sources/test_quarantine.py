"""A list of scans that are left out: written, read, applied, and loud where it does not apply."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from agssd.scans.sources.jobs import Job, Plan
from agssd.scans.sources.quarantine import Entry, apply_quarantine, quarantine_text, read_quarantine, source_sha256


def _plan(folder: Path, count: int = 4) -> Plan:
    for row in range(count):
        (folder / f"p{row}.nii").write_bytes(bytes([row]) * 100)
    return Plan([Job((folder / f"p{row}.nii",), f"p{row}") for row in range(count)])


def test_quarantine__written_list_takes_its_scans_out_and_no_other(tmp_path: Path) -> None:
    plan = _plan(tmp_path)
    bad = [tmp_path / "p1.nii", tmp_path / "p3.nii"]
    entries = [Entry(path, f"reason, of {path.stem}\n'odd'", source_sha256([path])) for path in bad]
    file = tmp_path / "lists/q.csv"
    file.parent.mkdir()
    file.write_text(quarantine_text(entries, file))
    apply_quarantine(plan, file)
    assert [job.subject for job in plan.jobs] == ["p0", "p2"]
    assert plan.refused == [(path, f"in quarantine: reason, of {path.stem}\n'odd'") for path in bad]
    assert plan.notes == []


def test_quarantine_text__paths_below_are_relative_and_others_absolute(tmp_path: Path) -> None:
    text = quarantine_text([Entry(tmp_path / "a/b.nii", "x"), Entry(tmp_path.parent / "c.nii", "y")], tmp_path / "q")
    assert text.splitlines() == ["path,sha256,reason", "a/b.nii,,x", f"{tmp_path.parent / 'c.nii'},,y"]


def test_quarantine__list_written_by_hand(tmp_path: Path) -> None:
    plan = _plan(tmp_path)
    (tmp_path / "q.csv").write_text(
        f"\ufeffReason, Path\nmoved,p0.nii\n,{tmp_path / 'p2.nii'}\n" + "motion,sub/../p3.nii\n"
    )
    (tmp_path / "sub").mkdir()
    apply_quarantine(plan, tmp_path / "q.csv")
    assert [job.subject for job in plan.jobs] == ["p1"]
    assert [reason for _, reason in plan.refused] == [
        "in quarantine: moved",
        "in quarantine: no reason stated",
        "in quarantine: motion",
    ]


def test_quarantine__file_that_changed_is_tried_again_and_it_says_so(tmp_path: Path) -> None:
    plan = _plan(tmp_path)
    file = tmp_path / "q.csv"
    file.write_text(quarantine_text([Entry(job.paths[0], "bad", source_sha256(job.paths)) for job in plan.jobs], file))
    (tmp_path / "p2.nii").write_bytes(b"mended")
    apply_quarantine(plan, file)
    assert [job.subject for job in plan.jobs] == ["p2"]
    assert plan.notes == [f"{tmp_path / 'p2.nii'} has changed since it was put into quarantine; it is tried again"]


def test_quarantine__entry_that_matches_nothing_is_reported(tmp_path: Path) -> None:
    plan = _plan(tmp_path)
    (tmp_path / "q.csv").write_text("path,reason\np0.nii,bad\nq0.nii,bad\n")
    apply_quarantine(plan, tmp_path / "q.csv")
    assert len(plan.jobs) == 3
    assert plan.notes == [f"quarantine {tmp_path / 'q.csv'}, line 3: {tmp_path / 'q0.nii'} is no scan of these sources"]


def test_quarantine__label_and_channel_take_their_scan_out(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a0.nii", "a1.nii", "a_seg.nii", "b.nii", "b_seg.nii")]
    for path in paths:
        path.write_bytes(path.name.encode())
    a0, a1, a_seg, b, b_seg = paths
    (tmp_path / "q.csv").write_text("path,reason\na1.nii,motion\nb_seg.nii,flipped\n")
    plan = Plan([Job((a0, a1), "a", a_seg), Job((b,), "b", b_seg), Job((a_seg,), "c")])
    apply_quarantine(plan, tmp_path / "q.csv")
    assert [job.subject for job in plan.jobs] == ["c"]
    assert plan.refused == [
        (a0, "in quarantine: motion"),
        (b, f"its label {b_seg} is in quarantine: flipped"),
    ]


def test_quarantine__scan_that_is_refused_anyway_is_known(tmp_path: Path) -> None:
    plan = _plan(tmp_path, 1)
    plan.refused.append((tmp_path / "x.mgz", "not read"))
    (tmp_path / "q.csv").write_text("path,reason\nx.mgz,not read\n")
    apply_quarantine(plan, tmp_path / "q.csv")
    assert plan.notes == [] and len(plan.refused) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.nii\nb.nii\n", "has no column path and no column reason; its first line must be"),
        ("path\na.nii\n", "has no column reason"),
        ("path,reason\n ,bad\na.nii,bad\n", "line 2: the path is empty"),
        ("path,reason,sha256\na.nii,bad,12ab\n", "line 2: sha256 is '12ab', not 64 hexadecimal digits"),
    ],
)
def test_read_quarantine__malformed_list_is_one_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "q.csv").write_text(text)
    with pytest.raises(ValueError, match="quarantine .*q.csv") as caught:
        read_quarantine(tmp_path / "q.csv")
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read"):
        read_quarantine(tmp_path / "none.csv")


def test_quarantine__hash_is_of_header_and_data(tmp_path: Path) -> None:
    (tmp_path / "a.hdr").write_bytes(b"head")
    (tmp_path / "a.img").write_bytes(b"data")
    digest = hashlib.sha256(b"headdata").hexdigest()
    for expected, row in ((0, digest), (1, hashlib.sha256(b"data").hexdigest())):
        (tmp_path / "q.csv").write_text(f"path,reason,sha256\na.img,bad,{row}\n")
        plan = Plan([Job((tmp_path / "a.img",), "a")])
        apply_quarantine(plan, tmp_path / "q.csv")
        assert len(plan.jobs) == len(plan.notes) == expected
    assert source_sha256([tmp_path / "none.nii"]) is None
