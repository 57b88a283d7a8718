"""From folders and manifests to jobs: subjects, labels, splits, and clear errors."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from agssd.scans.sources.files import list_folder, stem_of, suffix_of
from agssd.scans.sources.plan import Plan, plan_sources


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def _image(path: Path, shape: tuple[int, int, int] = (6, 7, 8), flipped: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.zeros(shape, dtype=np.uint8), np.eye(4))
    nib.save(image.as_reoriented(np.array([[0, -1], [2, 1], [1, 1]])) if flipped else image, path)


def _subjects(plan: Plan) -> dict[str, str]:
    return {job.paths[0].name: job.subject for job in plan.jobs}


def test_stem_of__drops_extension_and_channel(tmp_path: Path) -> None:
    names = {"a.nii.gz": "a", "a.b.nrrd": "a.b", "case_0000.nii": "case", "scan_2021.nii.gz": "scan_2021"}
    names |= {"case_0001.nii": "case", "case_0002.nii.gz": "case_0002", "amos_0001.nii.gz": "amos_0001"}
    _touch(tmp_path, "case_0000.nii")
    assert {name: stem_of(tmp_path / name) for name in names} == names
    assert suffix_of(Path("A.NII.GZ")) == ".nii.gz"


def test_list_folder__sorts_scans_refusals_and_the_rest(tmp_path: Path) -> None:
    _touch(tmp_path, "b.nii.gz", "a.mha", "README.md", "other.csv", ".hidden.nii", ".git/x.nii", "pair.img", "pair.hdr")
    _touch(tmp_path, "alone.hdr", "p.PAR", "series/1.dcm", "series/2.dcm")
    (tmp_path / "loose").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "bare").write_bytes(b"\x08\0\x05\0" + b"\0" * 200)
    scans, dicom, refused, ignored = list_folder(tmp_path)
    assert [path.name for path in dicom] == ["bare", "loose", "1.dcm", "2.dcm"]
    assert [path.name for path in scans] == ["a.mha", "b.nii.gz", "pair.img"]
    assert {path.name: reason for path, reason in refused} == {
        "alone.hdr": "a NIfTI or Analyze header without its .img",
        "p.PAR": "Philips PAR/REC is not read; convert it to NIfTI",
    }
    assert ignored == 3


def test_plan__subjects_from_files_folders_bids_and_expression(tmp_path: Path) -> None:
    _touch(tmp_path / "flat", "p1.nii", "p2.nii")
    assert _subjects(plan_sources([tmp_path / "flat"])) == {"p1.nii": "p1", "p2.nii": "p2"}
    _touch(tmp_path / "tree", "anna/T1.nii", "anna/T2x.nii", "bert/T1.nii", "imagesTr/q_0000.nii.gz")
    subjects = {
        job.paths[0].relative_to(tmp_path / "tree").as_posix(): job.subject
        for job in plan_sources([tmp_path / "tree"]).jobs
    }
    assert subjects == {
        "anna/T1.nii": "anna",
        "anna/T2x.nii": "anna",
        "bert/T1.nii": "bert",
        "imagesTr/q_0000.nii.gz": "q",
    }
    _touch(tmp_path / "bids", "sub-01/ses-1/anat/sub-01_T1w.nii.gz", "sub-01/ses-2/anat/sub-01_T1w.nii.gz")
    assert {job.subject for job in plan_sources([tmp_path / "bids"]).jobs} == {"01"}
    plan = plan_sources([tmp_path / "flat"], subject=r"p(1)")
    assert _subjects(plan) == {"p1.nii": "1"}
    assert [(path.name, reason) for path, reason in plan.refused] == [
        ("p2.nii", "its path does not match --subject 'p(1)'")
    ]
    with pytest.raises(ValueError, match="no regular expression"):
        plan_sources([tmp_path / "flat"], subject="(")


def test_plan__says_where_folders_became_subjects(tmp_path: Path) -> None:
    _touch(tmp_path / "tree", "anna/T1.nii", "anna/T2x.nii", "bert/T1.nii", "imagesTr/q_0000.nii.gz", "c.nii")
    note = "3 files taken as 2 subjects by folder; use --subject REGEX if a file is a subject"
    assert plan_sources([tmp_path / "tree"]).notes == [f"{tmp_path / 'tree'}: {note}"]
    assert plan_sources([tmp_path / "tree"], subject=r"([^/]+)\.nii").notes == []
    _touch(tmp_path / "flat", "p1.nii", "p2.nii")
    _touch(tmp_path / "bids", "sub-01/anat/sub-01_T1w.nii.gz", "sub-02/anat/sub-02_T1w.nii.gz")
    assert plan_sources([tmp_path / "flat", tmp_path / "bids"]).notes == []


def test_plan__many_files_of_one_folder_are_many_persons(tmp_path: Path) -> None:
    _touch(tmp_path, *(f"cohort/p{row}.nii" for row in range(11)))
    assert len(set(_subjects(plan_sources([tmp_path])).values())) == 11


def test_plan__labels_meet_their_images(tmp_path: Path) -> None:
    for name in (
        "imagesTr/a_0000.nii.gz",
        "labelsTr/a.nii.gz",
        "one/ct.nii.gz",
        "one/ct_seg.nii.gz",
        "two/T1.nii",
        "two/T2.nii",
    ):
        _image(tmp_path / name)
    _image(tmp_path / "two/lesion.nii", flipped=True)
    _image(tmp_path / "three/T1.nii")
    _image(tmp_path / "three/lesion.nii", (9, 9, 9))
    _image(tmp_path / "one/ct_seg2.nii.gz")
    plan = plan_sources([tmp_path], labels=["labelsTr/*", "*_seg*.nii.gz", "lesion.nii"])
    found = {job.paths[0].relative_to(tmp_path).as_posix(): job.label and job.label.name for job in plan.jobs}
    assert found == {
        "imagesTr/a_0000.nii.gz": "a.nii.gz",
        "one/ct.nii.gz": "ct_seg.nii.gz",
        "three/T1.nii": None,
        "two/T1.nii": "lesion.nii",
        "two/T2.nii": "lesion.nii",
    }
    reasons = {path.relative_to(tmp_path).as_posix(): reason for path, reason in plan.refused}
    assert reasons.keys() == {"one/ct_seg2.nii.gz", "three/lesion.nii"}
    assert "has a label already (ct_seg.nii.gz)" in reasons["one/ct_seg2.nii.gz"]
    assert "no image of its name or on its grid" in reasons["three/lesion.nii"]


def _labels(folder: Path, *globs: str) -> tuple[dict[str, str | None], set[str], list[str]]:
    """Return the label of every image, the refused files and the notes."""
    plan = plan_sources([folder], labels=globs)
    found = {job.paths[0].relative_to(folder).as_posix(): job.label and job.label.name for job in plan.jobs}
    return found, {path.name for path, _ in plan.refused}, plan.notes


def test_plan__a_stray_label_on_the_common_grid_is_nobodys(tmp_path: Path) -> None:
    names = ("aaa_seg", "case0", "case0_seg", "case1", "case1_seg", "jones", "smith", "miller_seg")
    for name in names:
        _image(tmp_path / f"{name}.nii.gz")
    found, refused, _ = _labels(tmp_path, "*_seg.nii.gz")
    assert found == {
        "case0.nii.gz": "case0_seg.nii.gz",
        "case1.nii.gz": "case1_seg.nii.gz",
        "jones.nii.gz": None,
        "smith.nii.gz": None,
    }
    assert refused == {"aaa_seg.nii.gz", "miller_seg.nii.gz"}


def test_plan__a_number_that_goes_on_is_another_case(tmp_path: Path) -> None:
    for name in ("case1", "case1_seg", "case10_seg", "case1-b", "case1-b_seg"):
        _image(tmp_path / f"{name}.nii.gz")
    found, refused, _ = _labels(tmp_path, "*_seg.nii.gz")
    assert found == {"case1.nii.gz": "case1_seg.nii.gz", "case1-b.nii.gz": "case1-b_seg.nii.gz"}
    assert refused == {"case10_seg.nii.gz"}


def test_plan__labels_by_grid_are_told_and_never_replace_one_by_name(tmp_path: Path) -> None:
    for name in ("T1", "T2", "T1_seg", "lesion"):
        _image(tmp_path / f"patient/{name}.nii")
    found, refused, notes = _labels(tmp_path, "*_seg.nii", "lesion.nii")
    assert found == {"patient/T1.nii": "T1_seg.nii", "patient/T2.nii": "lesion.nii"} and not refused
    assert any("lesion.nii: no image of its name" in note and "T2.nii" in note for note in notes)


def test_plan__labels_whose_last_word_alone_differs_belong_to_images_on_their_grid(tmp_path: Path) -> None:
    for name in (
        "b1_image",
        "b1_label",
        "p2_t1ce",
        "p2_FLAIR",
        "p2_label",
        "case_1",
        "case_label",
        "p3_T1",
        "p3_label",
    ):
        _image(tmp_path / f"{name}.nii", flipped=name == "p3_label")
    _image(tmp_path / "p3_T2.nii", (9, 9, 9))
    found, refused, _ = _labels(tmp_path, "*_label.nii")
    assert found == {
        "b1_image.nii": "b1_label.nii",
        "p2_t1ce.nii": "p2_label.nii",
        "p2_FLAIR.nii": "p2_label.nii",
        "case_1.nii": None,
        "p3_T1.nii": "p3_label.nii",
        "p3_T2.nii": None,
    }
    assert refused == {"case_label.nii"}


def test_plan__labels_lie_in_a_folder_beside_that_of_the_images(tmp_path: Path) -> None:
    for row in (1, 10):
        _image(tmp_path / f"images/case{row}.nii.gz")
        _image(tmp_path / f"masks/case{row}_mask.nii.gz")
    found, refused, _ = _labels(tmp_path, "masks/*")
    assert found == {f"images/case{row}.nii.gz": f"case{row}_mask.nii.gz" for row in (1, 10)} and not refused


def _dataset(folder: Path, **more: object) -> None:
    names = ["hip_001", "hip_002", "hip_003", "hip_004"]
    entries = [
        {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz", "subject": f"{1 + row // 2}"}
        for row, name in enumerate(names)
    ]
    for entry in entries:
        _touch(folder, entry["image"], entry["label"])
    _touch(folder, "imagesTs/hip_009.nii.gz", "MANIFEST.csv")
    data = {"modality": {"0": "MRI"}, "training": entries, "test": ["./imagesTs/hip_009.nii.gz"], **more}
    (folder / "dataset.json").write_text(json.dumps(data))


def test_plan__dataset_json_gives_labels_subjects_and_modality(tmp_path: Path) -> None:
    _dataset(tmp_path)
    plan = plan_sources([tmp_path])
    assert _subjects(plan) == {
        "hip_001.nii.gz": "1",
        "hip_002.nii.gz": "1",
        "hip_003.nii.gz": "2",
        "hip_004.nii.gz": "2",
        "hip_009.nii.gz": "hip_009",
    }
    assert [job.label is not None for job in plan.jobs] == [True] * 4 + [False]
    assert {job.modality for job in plan.jobs} == {"mri"} and plan.refused == [] and plan.ignored == 1
    assert plan.notes == []
    assert {job.split for job in plan.jobs} == {None}


def test_plan__given_modality_wins_over_dataset_json_but_not_over_a_manifest(tmp_path: Path) -> None:
    _dataset(tmp_path / "set")
    (tmp_path / "m.csv").write_text("path,modality\nother.nii,mri\n")
    _touch(tmp_path, "other.nii")
    plan = plan_sources([tmp_path / "set", tmp_path / "m.csv"], modality="ct")
    assert [job.modality for job in plan.jobs] == ["ct"] * 5 + ["mri"]
    note = f"{tmp_path / 'set/dataset.json'} says mri; its scans are taken for ct, as --modality says"
    assert plan.notes == [note]
    assert plan_sources([tmp_path / "set"], modality="mri").notes == []


def test_plan__dataset_json_of_several_contrasts_says_how_to_take_one(tmp_path: Path) -> None:
    _dataset(tmp_path, modality={"0": "FLAIR", "1": "T1w"})
    plan = plan_sources([tmp_path], volume=1)
    note = "its scans hold several contrasts (0 FLAIR, 1 T1w); --volume I takes one of them"
    assert plan.notes == [f"{tmp_path / 'dataset.json'}: {note}"]
    assert {(job.modality, job.volume) for job in plan.jobs} == {("mri", 1)}


def test_plan__suggested_split_by_image_or_subject_becomes_test(tmp_path: Path) -> None:
    for row, held in enumerate((["003", "004"], ["2"])):
        given = {"train": ["001", "002"] if row == 0 else ["1"], "val": held}
        _dataset(tmp_path / str(row), suggested_split=given)
        plan = plan_sources([tmp_path / str(row)])
        assert [job.split for job in plan.jobs] == [None, None, "test", "test", None]
        assert "the 1 subjects" in plan.notes[0] and "split test" in plan.notes[0]


def test_plan__suggested_split_through_a_subject_is_an_error(tmp_path: Path) -> None:
    _dataset(tmp_path, suggested_split={"train": ["001", "003", "004"], "val": ["002"]})
    with pytest.raises(ValueError, match="has subject '1' in train and val"):
        plan_sources([tmp_path])


def test_plan__dataset_json_of_another_form_is_said(tmp_path: Path) -> None:
    _touch(tmp_path, "a.nii")
    (tmp_path / "dataset.json").write_text('{"channel_names": {}}')
    assert "not in the form" in plan_sources([tmp_path]).notes[0]
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match=r"dataset\.json cannot be read as JSON"):
        plan_sources([tmp_path])


def test_plan__dataset_json_names_what_is_missing(tmp_path: Path) -> None:
    _dataset(tmp_path)
    (tmp_path / "imagesTr/hip_001.nii.gz").unlink()
    (tmp_path / "labelsTr/hip_003.nii.gz").unlink()
    plan = plan_sources([tmp_path])
    assert [reason.split(",")[-1] for _, reason in plan.refused] == [" but missing"] * 2
    assert len(plan.jobs) == 3


def test_plan__a_file_named_twice_is_cached_once(tmp_path: Path) -> None:
    _touch(tmp_path, "a.nii", "b.nii")
    plan = plan_sources([tmp_path, tmp_path / "a.nii"])
    assert [job.paths[0].name for job in plan.jobs] == ["a.nii", "b.nii"]
    assert [(path.name, reason) for path, reason in plan.refused] == [("a.nii", "named twice; it is cached once")]


def test_plan__missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none does not exist"):
        plan_sources([tmp_path / "none"])


def test_plan__shared_hippocampus_keeps_its_split_by_subject(shared_data: Path) -> None:
    plan = plan_sources([shared_data / "hippocampus"])
    assert len(plan.jobs) == 194 and all(job.label is not None for job in plan.jobs)
    test = {job.subject for job in plan.jobs if job.split == "test"}
    assert len(test) == 25 and sum(job.split == "test" for job in plan.jobs) == 39
    assert not test & {job.subject for job in plan.jobs if job.split is None}


def test_plan__numbers_after_other_letters_pair_on_one_grid_alone(tmp_path: Path) -> None:
    for number in (1, 2, 12):
        _image(tmp_path / f"img/img{number:04d}.nii.gz")
    for number in (1, 2, 3):
        _image(tmp_path / f"label/label{number:04d}.nii.gz", (6, 7, 9) if number == 2 else (6, 7, 8))
    _image(tmp_path / "img/other0012.nii.gz")
    _image(tmp_path / "label/label0012.nii.gz")
    plan = plan_sources([tmp_path], labels=["label/*"])
    found = {job.paths[0].name: job.label and job.label.name for job in plan.jobs}
    assert found == {
        "img0001.nii.gz": "label0001.nii.gz",
        "img0002.nii.gz": None,  # another grid
        "img0012.nii.gz": None,  # two images of the number
        "other0012.nii.gz": None,
    }
    assert {path.name for path, _ in plan.refused} == {f"label{number:04d}.nii.gz" for number in (2, 3, 12)}


def test_plan__numbered_cases_are_no_channels(tmp_path: Path) -> None:
    names = [f"amos_{number:04d}.nii.gz" for number in (1, 2, 99, 100)]
    for name in names:
        _image(tmp_path / "imagesVa" / name)
        _image(tmp_path / "labelsVa" / name)
    plan = plan_sources([tmp_path], labels=["labelsVa/*"])
    assert _subjects(plan) == {name: name.removesuffix(".nii.gz") for name in names}
    assert all(job.label == tmp_path / "labelsVa" / job.paths[0].name for job in plan.jobs) and len(plan.jobs) == 4


def test_plan__numbered_pictures_are_frames_of_one_recording(tmp_path: Path) -> None:
    flat = [f"video12_frame{number:03d}.png" for number in range(30)] + [f"video13_frame{n}.png" for n in range(4)]
    own = [f"video1/v1_{number:03d}.png" for number in range(30)] + [f"video2/{n:04d}.jpg" for n in range(12)]
    long = [f"seq1_{number:04d}.png" for number in range(120)]
    _touch(tmp_path / "us", *flat, *own, *long, *(f"benign ({number}).png" for number in range(3)), "p1.png", "p2.png")
    plan = plan_sources([tmp_path / "us"], modality="us")
    whose = {job.paths[0].relative_to(tmp_path / "us").as_posix(): job.subject for job in plan.jobs}
    assert len(whose) == 34 + 42 + 120 + 5
    for names, recordings in ((flat[:30], 1), (flat[30:], 1), (own[:30], 1), (own[30:], 1), (long, 1)):
        assert len({whose[name] for name in names}) == recordings
    assert len(set(whose.values())) == 5 + 5
    assert any("196 numbered pictures taken as frames of 5 recordings" in note for note in plan.notes)
    named = plan_sources([tmp_path / "us"], subject=r"([^/]+)\.(png|jpg)$", modality="us")
    assert len({job.subject for job in named.jobs}) > 100 and not any("recordings" in note for note in named.notes)
