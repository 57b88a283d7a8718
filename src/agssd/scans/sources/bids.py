"""What the names of a BIDS tree say: which files are images, of which kind, and which label belongs to which.

Source: Brain Imaging Data Structure 1.10 (entities ``key-value`` parted by ``_``, then a suffix).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from agssd.scans.sources.files import stem_of

_ASIDE = ("derivatives", "sourcedata")
_FIELD_MAPS = ("phasediff", "phase1", "phase2", "magnitude", "magnitude1", "magnitude2", "fieldmap", "TB1map")
_LABELS = ("dseg", "probseg", "mask", "defacemask", "roi")
_MRI_FOLDERS = ("anat", "func", "dwi", "perf", "swi", "pet")  # PET that was asked for is stored as MRI is
_PARTS = {"phase": "phase", "real": "real part", "imag": "imaginary part"}


class Name(NamedTuple):
    """A file name taken apart.

    Attributes:
        home: the data set: the folder above the first ``sub-...``, and above ``derivatives`` where it lies there.
        entities: by key, ``sub`` always among them.
        words: what stands between without being an entity, the suffix last.
    """

    home: Path
    entities: dict[str, str]
    words: tuple[str, ...]


def parse_name(path: Path) -> Name | None:
    """Return the parts of a name such as ``sub-01_ses-2_run-1_T1w.nii.gz``, or None where it has no ``sub-``."""
    tokens = stem_of(path).split("_")
    entities = dict(token.split("-", 1) for token in tokens if re.fullmatch(r"[A-Za-z]+-[^-]+", token))
    if "sub" not in entities:
        return None
    home = path.parent
    for above in path.parents:
        if above.name.startswith("sub-") or above.name in _ASIDE:
            home = above.parent
    return Name(home, entities, tuple(token for token in tokens if "-" not in token))


def set_aside(paths: Iterable[Path], folder: Path) -> set[Path]:
    """Return the files that lie in ``derivatives/`` or ``sourcedata/`` of a BIDS data set within the folder."""
    is_dataset: dict[Path, bool] = {}
    aside = set()
    for path in paths:
        parts = path.relative_to(folder).parts[:-1]
        for place in (folder.joinpath(*parts[:row]) for row, part in enumerate(parts) if part in _ASIDE):
            if place not in is_dataset:
                is_dataset[place] = (place / "dataset_description.json").is_file() or any(place.glob("sub-*"))
            if is_dataset[place]:
                aside.add(path)
    return aside


def why_no_image(path: Path, pet: bool = False) -> str | None:
    """Return why a file is no image of anatomy by its name, or None where it is one, a wanted PET, or no BIDS name."""
    name = parse_name(path)
    if name is None:
        return None
    suffix = name.words[-1] if name.words else ""
    part = _PARTS.get(name.entities.get("part", ""))
    if path.parent.name == "fmap" or suffix in _FIELD_MAPS:
        return "a BIDS field map, no image of anatomy; name the file itself to take it"
    if part is not None:
        return f"the {part} of a complex image by its BIDS name; name the file itself to take it"
    if suffix in _LABELS:
        return f"a BIDS label map (its name ends in {suffix}); name such files with --labels"
    if suffix == "pet" and not pet:
        return "a PET scan by its BIDS name; pass --pet to take it"
    return None


def modality_of(path: Path) -> str | None:
    """Return "ct" or "mri" where the name or the folder of a BIDS file says so, else None."""
    name = parse_name(path)
    if name is None:
        return None
    if name.words and name.words[-1].lower() == "ct":
        return "ct"
    return "mri" if path.parent.name in _MRI_FOLDERS else None


def owners_by_name(images: Sequence[Path], same_grid: Callable[[Path, Path], bool]) -> Callable[[Path], list[Path]]:
    """Return a function from a label to the images it belongs to by its BIDS name.

    Subject and session are the image's, and no entity contradicts: of those images the ones that share the most
    entities, and of these the ones whose suffix the label names (``sub-1_T1w_desc-tumor_dseg``). Where that leaves
    several, or label and image are said to be in different spaces, the grid decides. A label in a folder of the name of
    a kind of data (``anat``, ``dwi``) belongs to images of that kind where there are any.
    """
    known: dict[tuple[Path, str], list[tuple[Path, Name]]] = defaultdict(list)
    for path in images:
        name = parse_name(path)
        if name is not None:
            known[name.home, name.entities["sub"]].append((path, name))

    def owners(label: Path) -> list[Path]:
        mine = parse_name(label)
        if mine is None:
            return []
        ranked: dict[tuple[bool, int, int, bool], list[Path]] = defaultdict(list)
        for path, name in known[mine.home, mine.entities["sub"]]:
            shared = name.entities.keys() & mine.entities.keys()
            fits = all(name.entities[key] == mine.entities[key] for key in shared)
            if fits and name.entities.get("ses") == mine.entities.get("ses"):
                same_kind = path.parent.name == label.parent.name
                rank = (same_kind, len(shared), -len(name.entities), bool({*name.words} & {*mine.words}))
                ranked[rank].append(path)
        best = ranked[max(ranked)] if ranked else []
        moved = [path for path in best if _space(path) != _space(label)]
        return best if len(best) == 1 and not moved else [path for path in best if same_grid(path, label)]

    return owners


def _space(path: Path) -> str | None:
    name = parse_name(path)
    return None if name is None else name.entities.get("space")
