"""Whether caches can be used together, and how their volumes were prepared."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from agssd.data_modules.cache import CaseInfo, VolumeCache
from agssd.scans.preparing.volumes import CT_RANGE_HU, MRI_PERCENTILES, same_spacing
from agssd.types import Size

_LOG = logging.getLogger(__name__)


def check_agreement(caches: Sequence[VolumeCache], modality: str | None = None) -> None:
    """Refuse caches whose cases differ in channels or spacing, or of which some are volumes and some frames.

    Frames may differ in spacing: each view knows its own.

    Args:
        caches: open caches.
        modality: look at the cases of this one only.

    Raises:
        ValueError: naming a case of each kind, its cache and the remedy, or if there is no case at all.
    """
    cases = [(cache, cache.cases[row]) for cache in caches for row in cache.select(modality=modality)]
    if not cases:
        kind = "" if modality is None else f" of data.modality {modality}"
        raise ValueError(
            f"no cases{kind} in data.cache {[str(cache.path) for cache in caches]}; run `agssd prepare` again"
        )
    first_cache, first = cases[0]
    for cache, info in cases:
        inside = cache is first_cache
        who = f"the cases of {cache.path}" if inside else "caches"
        here, there = (
            f"case {case.key} ({case.modality})" if inside else f"{place.path} (case {case.key}, {case.modality})"
            for place, case in ((first_cache, first), (cache, info))
        )
        if info.spatial_dims != first.spatial_dims:
            raise ValueError(
                f"{who} disagree: {here} is {_kind(first)}, {there} is {_kind(info)}; prepare and train on them "
                "separately"
            )
        if info.channels != first.channels:
            raise ValueError(
                f"{who} disagree in channels: {here} has {first.channels}, {there} has {info.channels}; "
                + ("prepare one cache for each number" if inside else "train on them separately")
            )
        if info.spatial_dims == 3 and not same_spacing(info.spacing_mm, first.spacing_mm):
            if info.modality != first.modality:
                remedy = (
                    "run `agssd prepare` once per --modality and train on one (a downstream task may choose with "
                    "data.modality), or give all one --spacing-mm"
                )
            elif inside:
                remedy = "prepare it again with one --spacing-mm"
            else:
                remedy = "prepare both with the same --spacing-mm"
            raise ValueError(
                f"{who} disagree in spacing: {here} has {list(first.spacing_mm)} mm, {there} has "
                f"{list(info.spacing_mm)} mm; {remedy}"
            )


def check_dims(cache: VolumeCache, argument: str, size: Size) -> None:
    """Refuse a size that has another number of axes than the cases of a cache.

    Raises:
        ValueError: naming the argument, the cache and the remedy.
    """
    info = cache.cases[0]
    if len(size) != info.spatial_dims:
        kind, wanted = ("volumes", "three numbers (D, H, W)") if info.spatial_dims == 3 else ("frames", "two (H, W)")
        raise ValueError(f"{argument} is {list(size)}, but the cases of {cache.path} are {kind}; give {wanted}")


def check_regions(caches: Sequence[VolumeCache], rows: Sequence[tuple[int, int]]) -> None:
    """Refuse cases without a region map.

    Args:
        caches: open caches.
        rows: (cache, case) of the cases that are drawn from.

    Raises:
        ValueError: naming a case, its cache and the remedy.
    """
    for cache, case in rows:
        info = caches[cache].cases[case]
        if info.num_regions is None:
            path = caches[cache].path
            raise ValueError(
                f"data.regions is true, but case {info.key} of {path} has no region map; write a cache that has: "
                f"agssd regions {path} --source supervoxels --out CACHE"
            )


def _kind(info: CaseInfo) -> str:
    return "a volume" if info.spatial_dims == 3 else "a sequence of frames"


def warn_of_subjects(caches: Sequence[VolumeCache]) -> None:
    """Warn where one person may be, or is, in different splits of joined caches.

    Keys made with different salts, or with an unknown one, cannot be compared.
    """
    if len(caches) < 2:
        return
    names = ", ".join(str(cache.path) for cache in caches)
    fingerprints = {cache.salt_fingerprint for cache in caches}
    if None in fingerprints or len(fingerprints) > 1:
        _LOG.warning(
            "subjects cannot be matched across data.cache %s: their keys were made with different or unknown salts, so "
            "one person may be in train of one and in val or test of another; prepare them with one salt file, "
            "`agssd prepare --salt FILE`",
            names,
        )
        return
    splits: dict[str, set[str]] = defaultdict(set)
    for cache in caches:
        for info in cache.cases:
            splits[info.subject].add(info.split)
    torn = sorted(subject for subject, found in splits.items() if len(found) > 1)
    if torn:
        _LOG.warning(
            "%d subjects are in different splits of data.cache %s, for example %s (%s); prepare all sources into one "
            "cache, `agssd prepare SOURCE SOURCE --out CACHE`",
            len(torn),
            names,
            torn[0],
            ", ".join(sorted(splits[torn[0]])),
        )


def cache_contract(cases: Sequence[CaseInfo]) -> dict[str, Any]:
    """Return the preprocessing contract of ``cases``, see ``PretrainDataModule.contract``."""
    modalities = sorted({info.modality for info in cases})
    rules: dict[str, dict[str, Any]] = {
        # Source: docs/method.md §1.5, intensity
        "ct": {"rule": "window", "low": CT_RANGE_HU[0], "high": CT_RANGE_HU[1], "range": [0.0, 1.0]},
        "mri": {"rule": "foreground_percentiles", "percentiles": list(MRI_PERCENTILES), "range": [-1.0, 1.0]},
    }
    rules["us"] = rules["mri"]
    first = cases[0]
    spacing = first.spacing_mm[-first.spatial_dims :]
    one_spacing = all(info.in_mm and same_spacing(info.spacing_mm, first.spacing_mm) for info in cases)
    return {
        "spacing_mm": [float(s) for s in spacing] if first.spatial_dims == 3 or one_spacing else None,
        "orientation": "SAR" if first.spatial_dims == 3 else "IR",
        "modality": modalities[0] if len(modalities) == 1 else "mixed",
        "intensity": {modality: rules[modality] for modality in modalities},
        "channels": int(cases[0].channels),
    }
