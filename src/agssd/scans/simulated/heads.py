"""A cohort of simulated heads, made from one real template, for the demo and for trying things out.

Every subject is the MNI152 T1 average that the nilearn package ships, deformed and degraded by torchio. Anatomy that
differs between people is therefore not in it: figures measured on this cohort say that the parts work together, and
nothing about patients.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LABEL_NAMES = ("background", "grey matter", "white matter")
_TEMPLATE = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
_MARGIN_MM = 8.0
_NUM_CONTROL_POINTS = 7
_NUM_BIAS_COEFFICIENTS = 20  # of a polynomial of order 3 in three variables


@dataclass(frozen=True)
class Template:
    """The template at one spacing, cut to the brain, arrays in NIfTI order (i, j, k) = (R, A, S).

    Attributes:
        t1: skull-stripped T1, float32 in [0, 1].
        grey: share of grey matter, float32 in [0, 1].
        white: share of white matter, float32 in [0, 1].
        affine: (4, 4) voxel to world mm.
    """

    t1: NDArray[np.float32]
    grey: NDArray[np.float32]
    white: NDArray[np.float32]
    affine: NDArray[np.float64]


def load_template(spacing_mm: float) -> Template:
    """Return the MNI152 template that nilearn ships, resampled to ``spacing_mm`` and cut to the brain.

    The files are read from the installed package; nothing is downloaded and nilearn is not imported.

    Raises:
        ValueError: if nilearn is not installed.
    """
    import torchio as tio

    package = find_spec("nilearn")
    if package is None or not package.submodule_search_locations:
        raise ValueError("the template is in the package nilearn, which is not installed: pip install 'agssd[demo]'")
    folder = Path(package.submodule_search_locations[0]) / "datasets" / "data"
    images = {name: tio.ScalarImage(folder / _TEMPLATE.format(name)) for name in ("t1", "gm", "wm")}
    subject: Any = tio.Resample(spacing_mm, antialias=True)(tio.Subject(**images))
    arrays = {name: np.clip(subject[name].numpy()[0] / 255.0, 0.0, 1.0).astype(np.float32) for name in images}
    margin = round(_MARGIN_MM / spacing_mm)
    inside = np.nonzero(arrays["t1"] > 0.1)
    start = [max(int(where.min()) - margin, 0) for where in inside]
    stop = [int(where.max()) + 1 + margin for where in inside]
    box = tuple(slice(first, last) for first, last in zip(start, stop, strict=True))
    affine = np.array(subject["t1"].affine, dtype=np.float64)
    affine[:3, 3] += affine[:3, :3] @ np.asarray(start, dtype=np.float64)
    return Template(arrays["t1"][box], arrays["gm"][box], arrays["wm"][box], affine)


def draw_parameters(rng: np.random.Generator) -> dict[str, Any]:
    """Return one subject's parameters: shape (affine, elastic), then contrast, bias field, motion and noise.

    Elastic displacements are at most 7 mm between control points about 30 mm apart, rotations at most 8 degrees; half
    of the subjects move once during the scan.
    """
    control = rng.uniform(-7.0, 7.0, (*[_NUM_CONTROL_POINTS] * 3, 3))
    for axis in range(3):
        for border in (0, 1, -2, -1):
            control[(slice(None),) * axis + (border,)] = 0.0
    moves = int(rng.random() < 0.5)
    return {
        "scales": tuple(rng.uniform(0.9, 1.1, 3)),
        "degrees": tuple(rng.uniform(-8.0, 8.0, 3)),
        "translation": tuple(rng.uniform(-5.0, 5.0, 3)),
        "control_points": control.astype(np.float32),
        "gamma": float(np.exp(rng.uniform(-0.4, 0.4))),
        "bias": rng.uniform(-0.35, 0.35, _NUM_BIAS_COEFFICIENTS).tolist(),
        "motion_degrees": rng.uniform(-4.0, 4.0, (moves, 3)),
        "motion_translation": rng.uniform(-4.0, 4.0, (moves, 3)),
        "motion_times": rng.uniform(0.3, 0.7, moves),
        "noise": float(rng.uniform(0.02, 0.07)),
        "noise_seed": int(rng.integers(2**31)),
        "gain": float(rng.uniform(300.0, 1500.0)),
    }


def simulate_subject(template: Template, parameters: Mapping[str, Any]) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Return image and label map of one subject, both on the template's grid.

    Tissue maps follow the same deformation as the image and are cut to labels afterwards, so that labels keep smooth
    borders: 1 where grey matter is the larger share and above one half, 2 likewise for white matter, else 0. Outside
    the deformed brain the image is 0, as after skull-stripping.

    Args:
        template: from :func:`load_template`.
        parameters: from :func:`draw_parameters`.
    """
    import torch
    import torchio as tio

    maps = {"t1": template.t1, "brain": (template.t1 > 0.1).astype(np.float32)}
    maps |= {"grey": template.grey, "white": template.white}
    subject: Any = tio.Subject(
        **{name: tio.ScalarImage(tensor=torch.from_numpy(m[None]), affine=template.affine) for name, m in maps.items()}
    )
    steps = [
        tio.Affine(parameters["scales"], parameters["degrees"], parameters["translation"], default_pad_value=0.0),
        tio.ElasticDeformation(parameters["control_points"], (7.0, 7.0, 7.0)),
        tio.BiasField(parameters["bias"], 3, include=["t1"]),
    ]
    if len(parameters["motion_times"]):
        steps.append(
            tio.Motion(
                parameters["motion_degrees"],
                parameters["motion_translation"],
                parameters["motion_times"],
                "linear",
                include=["t1"],
            )
        )
    steps.append(tio.Noise(0.0, parameters["noise"], parameters["noise_seed"], include=["t1"]))
    with torch.random.fork_rng(devices=[]):  # torchio draws a number to decide whether to apply a transform
        for step in steps:
            if isinstance(step, tio.BiasField):  # contrast belongs to the tissue, the bias field to the coil
                subject["t1"].set_data(subject["t1"].data.clamp(min=0) ** parameters["gamma"])
            subject = step(subject)
    found = {name: subject[name].numpy()[0] for name in maps}
    image = np.clip(found["t1"], 0.0, None) * (found["brain"] > 0.5) * parameters["gain"]
    label = np.zeros(template.t1.shape, np.uint8)
    label[(found["grey"] > 0.5) & (found["grey"] >= found["white"])] = 1
    label[(found["white"] > 0.5) & (found["white"] > found["grey"])] = 2
    return np.clip(np.rint(image), 0, 32767).astype(np.int16), label


def write_cohort(
    folder: Path,
    counts: Mapping[str, int],
    spacing_mm: float,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> Path:
    """Write simulated heads as NIfTI with a manifest for ``agssd prepare`` and return the manifest.

    Args:
        folder: where ``images/``, ``labels/`` and ``manifest.csv`` go.
        counts: subjects of each split, in the order in which they are numbered.
        spacing_mm: of the isotropic grid.
        seed: of the cohort; subject n depends on (seed, n) alone.
        progress: called after every subject with the number done and the number of all.
    """
    template = load_template(spacing_mm)

    def make(rng: np.random.Generator) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        return simulate_subject(template, draw_parameters(rng))

    return write_subjects(folder, counts, make, template.affine, "mri", seed, progress)


def write_subjects(
    folder: Path,
    counts: Mapping[str, int],
    make: Callable[[np.random.Generator], tuple[NDArray[np.int16], NDArray[np.uint8]]],
    affine: NDArray[np.float64],
    modality: str,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> Path:
    """Write simulated subjects as :func:`write_cohort` does.

    Args:
        folder: where ``images/``, ``labels/`` and ``manifest.csv`` go.
        counts: subjects of each split, in the order in which they are numbered.
        make: image and label map of a subject from its random numbers.
        affine: (4, 4) voxel to world mm of all of them.
        modality: "ct" or "mri".
        seed: of the cohort; subject n depends on (seed, n) alone.
        progress: called after every subject with the number done and the number of all.
    """
    import nibabel as nib

    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    splits = [split for split, count in counts.items() for _ in range(count)]
    rows = []
    for number, split in enumerate(splits):
        subject = f"sim{number:03d}"
        image, label = make(np.random.default_rng((seed, number)))
        for name, array in (("images", image), ("labels", label)):
            nifti = nib.Nifti1Image(array, affine)
            nifti.header.set_xyzt_units("mm")
            nib.save(nifti, folder / name / f"{subject}.nii.gz")
        rows.append([f"images/{subject}.nii.gz", subject, modality, f"labels/{subject}.nii.gz", split])
        progress(number + 1, len(splits))
    manifest = folder / "manifest.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "subject", "modality", "label_path", "split"])
        writer.writerows(rows)
    return manifest
