"""What a cache holds, in words for a page: no path, no key of a case."""

from __future__ import annotations

from agssd.data_modules.cache import VolumeCache


def cache_facts(cache: VolumeCache) -> list[tuple[str, str]]:
    """Return (name, value): cases, modality, spacing, size, channels, labels, bytes."""
    cases = cache.cases
    splits = ", ".join(f"{count} {split}" for split in ("train", "val", "test") if (count := len(cache.select(split))))
    shapes = list(zip(*(info.shape for info in cases), strict=True))
    frames = all(info.spatial_dims == 2 for info in cases)  # whose first axis is time
    spacings = sorted({tuple(round(size, 3) for size in info.spacing_mm[frames:]) for info in cases})
    units = {True: "mm", False: "pixels, since their size in mm is not known"}
    unit = " or ".join(units[known] for known in sorted({info.in_mm for info in cases}, reverse=True))
    unit += " (H × W)" if frames else " (D × H × W)"
    told = "; ".join(" × ".join(f"{size:g}" for size in spacing) for spacing in spacings[:3])
    labels = sorted({value for info in cases for value in info.label_values or () if value})
    entries = [
        ("cases", f"{len(cases)} of {len({info.subject for info in cases})} subjects ({splits})"),
        ("modality", ", ".join(sorted({info.modality.upper() for info in cases}))),
        ("spacing", f"{told} {unit}{', and others' if len(spacings) > 3 else ''}"),
        ("size", " × ".join(f"{min(axis)}–{max(axis)}" if min(axis) < max(axis) else f"{axis[0]}" for axis in shapes)),
        ("channels", ", ".join(sorted({str(info.channels) for info in cases}))),
        ("labels", f"{len(labels)} classes" if labels else "none"),
        ("on disk", f"{cache.size_bytes() / 2**20:,.0f} MiB"),
    ]
    return entries
