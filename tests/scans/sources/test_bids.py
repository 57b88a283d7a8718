"""BIDS trees: whose an image is, what is no image, and which label belongs to which, by name alone where it can be."""

from __future__ import annotations

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from agssd.commands import prepare
from agssd.data_modules.cache import VolumeCache
from agssd.scans.sources.bids import modality_of, parse_name
from agssd.scans.sources.plan import Plan, plan_sources


def _image(path: Path, shape: tuple[int, ...] = (6, 7, 8), spacing: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.zeros(shape, dtype=np.uint8), np.diag([spacing] * 3 + [1.0])), path)


def _tree(root: Path, names: list[str]) -> Path:
    for name in names:
        _image(root / name)
        (root / name.replace(".nii.gz", ".json")).write_text("{}")
    (root / "dataset_description.json").write_text('{"Name": "made", "BIDSVersion": "1.10.0"}')
    (root / "participants.tsv").write_text("participant_id\tage\nsub-01\t40\n")
    return root


def _owners(plan: Plan, root: Path) -> dict[str, str | None]:
    return {
        job.paths[0].relative_to(root).as_posix(): job.label and job.label.relative_to(root).as_posix()
        for job in plan.jobs
    }


def test_bids__contrasts_and_sessions_are_cases_of_one_subject_and_sidecars_are_passed_over(tmp_path: Path) -> None:
    root = _tree(
        tmp_path,
        [
            "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz",
            "sub-01/ses-1/anat/sub-01_ses-1_FLAIR.nii.gz",
            "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz",
            "sub-02/ses-1/anat/sub-02_ses-1_run-1_T1w.nii.gz",
            "sub-02/ses-1/ct/sub-02_ses-1_ct.nii.gz",
        ],
    )
    plan = plan_sources([root])
    assert [(job.subject, job.modality) for job in plan.jobs] == [("01", "mri")] * 3 + [("02", "mri"), ("02", "ct")]
    assert plan.refused == [] and plan.notes == [] and plan.ignored == 5 + 2
    assert {job.modality for job in plan_sources([root], modality="ct").jobs} == {"ct"}


def test_bids__derivatives_and_sourcedata_only_where_asked(tmp_path: Path) -> None:
    names = [
        "sub-01/anat/sub-01_T1w.nii.gz",
        "derivatives/prep/sub-01/anat/sub-01_space-MNI_desc-preproc_T1w.nii.gz",
        "derivatives/lesions/sub-01/anat/sub-01_desc-lesion_dseg.nii.gz",
        "sourcedata/sub-01/anat/sub-01_T1w.nii.gz",
    ]
    root = _tree(tmp_path / "set", names)
    (root / "derivatives/freesurfer").mkdir()
    (root / "derivatives/freesurfer/brain.mgz").write_bytes(b"x")
    plan = plan_sources([root])
    assert _owners(plan, root) == {names[0]: None} and plan.refused == []
    left_out = "files in derivatives/ and sourcedata/ are left out; name such a folder as a source to prepare it"
    assert plan.notes == [f"{root}: 4 {left_out}"]
    labelled = plan_sources([root], labels=["*_dseg.nii.gz"])
    assert _owners(labelled, root) == {names[0]: names[2]} and labelled.notes == [f"{root}: 3 {left_out}"]
    asked = plan_sources([root / "derivatives/prep"])
    assert _owners(asked, root) == {names[1]: None} and asked.notes == [] and asked.jobs[0].subject == "01"
    above = plan_sources([tmp_path])
    assert _owners(above, root) == {names[0]: None} and above.refused == []
    _image(tmp_path / "plain/derivatives/a.nii.gz")  # no BIDS tree
    assert len(plan_sources([tmp_path / "plain"]).jobs) == 1


def test_bids__a_label_in_a_folder_of_a_kind_belongs_to_images_of_that_kind(tmp_path: Path) -> None:
    names = [
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/anat/sub-01_FLAIR.nii.gz",
        "sub-01/dwi/sub-01_dwi.nii.gz",
        "derivatives/lesions/sub-01/anat/sub-01_desc-lesion_mask.nii.gz",
    ]
    root = _tree(tmp_path / "set", names)
    owners = _owners(plan_sources([root], labels=["*_mask.nii.gz"]), root)
    assert owners == {names[0]: names[3], names[1]: names[3], names[2]: None}


def test_bids__a_description_alone_or_a_subject_alone_makes_a_tree(tmp_path: Path) -> None:
    for name in ("one/derivatives/x.nii.gz", "two/derivatives/x.nii.gz", "two/sub-1/anat/sub-1_T1w.nii.gz"):
        _image(tmp_path / name)
    (tmp_path / "one/dataset_description.json").write_text("{}")
    assert plan_sources([tmp_path / "one"]).jobs == []
    assert len(plan_sources([tmp_path / "two"]).jobs) == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fmap/sub-01_phasediff", "a BIDS field map"),
        ("fmap/sub-01_dir-AP_epi", "a BIDS field map"),
        ("anat/sub-01_part-phase_T2starw", "the phase of a complex image"),
        ("anat/sub-01_part-imag_T2starw", "the imaginary part of a complex image"),
        ("anat/sub-01_desc-lesion_mask", "a BIDS label map (its name ends in mask); name such files with --labels"),
        ("anat/sub-01_label-GM_probseg", "a BIDS label map (its name ends in probseg)"),
        ("pet/sub-01_pet", "a PET scan by its BIDS name"),
    ],
)
def test_bids__what_is_no_image_of_anatomy_has_its_own_reason(tmp_path: Path, name: str, reason: str) -> None:
    root = _tree(tmp_path, [f"sub-01/{name}.nii.gz", "sub-01/anat/sub-01_T1w.nii.gz"])
    plan = plan_sources([root])
    assert [path.name for path, _ in plan.refused] == [f"{name.split('/')[1]}.nii.gz"]
    assert plan.refused[0][1].startswith(reason) and [job.paths[0].name for job in plan.jobs] == ["sub-01_T1w.nii.gz"]
    if name.startswith("pet"):
        assert [job.modality for job in plan_sources([root], pet=True).jobs] == ["mri", "mri"]
    asked = plan_sources([root / f"sub-01/{name}.nii.gz"])  # a file that is named is not refused by its name
    assert len(asked.jobs) == 1 and asked.jobs[0].subject == "01"


def test_bids__labels_meet_their_images_by_entities(tmp_path: Path) -> None:
    images = [
        "sub-01/ses-1/anat/sub-01_ses-1_run-1_T1w.nii.gz",
        "sub-01/ses-1/anat/sub-01_ses-1_run-2_T1w.nii.gz",
        "sub-01/ses-2/anat/sub-01_ses-2_run-1_T1w.nii.gz",
        "sub-02/ses-1/anat/sub-02_ses-1_run-1_T1w.nii.gz",
        "sub-02/ses-1/anat/sub-02_ses-1_run-1_FLAIR.nii.gz",
    ]
    place = "derivatives/manual"
    labels = [
        f"{place}/sub-01/ses-1/anat/sub-01_ses-1_run-1_desc-tumor_dseg.nii.gz",
        f"{place}/sub-01/ses-1/anat/sub-01_ses-1_run-2_desc-tumor_dseg.nii.gz",
        f"{place}/sub-01/ses-2/anat/sub-01_ses-2_label-tumor_dseg.nii.gz",
        f"{place}/sub-02/ses-1/anat/sub-02_ses-1_run-1_FLAIR_desc-tumor_dseg.nii.gz",
        f"{place}/sub-03/ses-1/anat/sub-03_ses-1_dseg.nii.gz",
        f"{place}/sub-02/ses-3/anat/sub-02_ses-3_dseg.nii.gz",
    ]
    root = _tree(tmp_path, [*images, *labels])
    plan = plan_sources([root], labels=["*_dseg.nii.gz"])
    wanted = dict(zip(images, [*labels[:3], None, labels[3]], strict=True))
    assert _owners(plan, root) == wanted
    assert {path.relative_to(root).as_posix() for path, _ in plan.refused} == set(labels[4:])
    assert all("no image of its name or on its grid" in reason for _, reason in plan.refused)


def test_bids__one_label_of_several_contrasts_goes_to_those_on_its_grid(tmp_path: Path) -> None:
    for name, spacing in (("T1w", 1.0), ("T2w", 1.0), ("FLAIR", 2.0)):
        _image(tmp_path / f"sub-1/anat/sub-1_{name}.nii.gz", spacing=spacing)
    label = tmp_path / "derivatives/man/sub-1/anat/sub-1_dseg.nii.gz"
    _image(label)
    plan = plan_sources([tmp_path], labels=["*_dseg*"])
    assert {job.paths[0].name: job.label for job in plan.jobs} == {
        "sub-1_FLAIR.nii.gz": None,
        "sub-1_T1w.nii.gz": label,
        "sub-1_T2w.nii.gz": label,
    }


def test_bids__a_label_in_another_space_is_not_forced_on_the_image(tmp_path: Path) -> None:
    _image(tmp_path / "sub-1/anat/sub-1_T1w.nii.gz")
    label = tmp_path / "derivatives/man/sub-1/anat/sub-1_space-MNI152_dseg.nii.gz"
    for shape, expected in (((9, 9, 9), None), ((6, 7, 8), label)):
        _image(label, shape)
        plan = plan_sources([tmp_path], labels=["*_dseg*"])
        assert [job.label for job in plan.jobs] == [expected] and len(plan.refused) == (expected is None)


def test_bids__same_subject_of_another_data_set_gets_no_foreign_label(tmp_path: Path) -> None:
    for name in ("one", "two"):
        _image(tmp_path / name / "sub-1/anat/sub-1_T1w.nii.gz")
        (tmp_path / name / "dataset_description.json").write_text("{}")
    label = tmp_path / "two/derivatives/man/sub-1/anat/sub-1_desc-x_dseg.nii.gz"
    _image(label)
    plan = plan_sources([tmp_path], labels=["*_dseg*"])
    assert [(job.paths[0].parts[-4], job.label) for job in plan.jobs] == [("one", None), ("two", label)]


def test_bids__series_over_time_is_refused_unless_a_volume_is_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for name, shape in (("anat/sub-1_T1w", (12, 14, 10)), ("func/sub-1_task-rest_bold", (12, 14, 10, 5))):
        path = tmp_path / "set/sub-1" / f"{name}.nii.gz"
        path.parent.mkdir(parents=True)
        nib.save(nib.Nifti1Image(rng.normal(300, 40, shape).astype(np.float32), np.eye(4)), path)
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    for more, code, count in (([], 3, 1), (["--volume", "2"], 0, 2)):
        out = tmp_path / f"{count}.h5"
        assert prepare.run(parser.parse_args([str(tmp_path / "set"), "--out", str(out), *more])) == code
        cache = VolumeCache(out)
        assert len(cache) == count and len({case.subject for case in cache.cases}) == 1
    reason = "bold.nii.gz: 4D image (12x14x10x5); --volume I (from 0) takes one of its 5 volumes"
    assert capsys.readouterr().out.count(reason) == 1


def test_parse_name__takes_names_apart() -> None:
    name = parse_name(Path("/d/derivatives/x/sub-01/ses-a/anat/sub-01_ses-a_T1w_label-L_mask.nii.gz"))
    assert name is not None and name.home == Path("/d") and name.words == ("T1w", "mask")
    assert name.entities == {"sub": "01", "ses": "a", "label": "L"}
    assert parse_name(Path("/d/patient_1.nii")) is None and modality_of(Path("/d/anat/1.nii")) is None
