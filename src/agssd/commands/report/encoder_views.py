"""What the encoder of a run sees in whole volumes: principal components of its tokens, and attention of [CLS]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agssd.commands.report.run_files import Run, short_key
from agssd.commands.report.volumes import Layer, as_grey, shrink_factors, shrunk, viewer
from agssd.types import Size, Triple

if TYPE_CHECKING:
    from agssd.data_modules.cache import CaseInfo, VolumeCache
    from agssd.models.backbone import Backbone

# Largest size of what is encoded, around the middle of the body, by axes of space; of sequences so many frames.
MAX_VOX: dict[int, Triple] = {3: (192, 192, 192), 2: (16, 640, 640)}
_MIN_FOREGROUND = 0.05  # share of body in a patch from which its token takes part
_OVERLAP = 0.5
Floats = NDArray[np.float32]


@dataclass
class Encoded:
    """A case as the encoder sees it; token maps cover the box, padded at its end to whole patches.

    Attributes:
        info: of the case.
        start: first voxel of the box.
        image: (D, H, W) first channel in the model's range.
        body: (D, H, W) bool.
        grid: of the tokens.
        inside: (D', H', W') bool, tokens on the body.
        tokens: (N, E).
        attention: (heads, D', H', W'), 1 = no preference; None without [CLS].
        colours: (D', H', W', 3) in [0, 1], the principal components over all cases.
        own_colours: the same over this case alone.
    """

    info: CaseInfo
    start: Triple
    image: Floats
    body: NDArray[np.bool_]
    grid: Size
    inside: NDArray[np.bool_]
    tokens: Floats
    attention: Floats | None
    colours: Floats
    own_colours: Floats


def encode_cases(run: Run, encoder: Backbone, cache: VolumeCache, count: int, device: str) -> list[Encoded]:
    """Return ``count`` cases with their token maps and attention, held-out ones where there are any.

    Raises:
        ValueError: if the cache was prepared in another way than the encoder wants.
    """
    import torch

    from agssd.data_modules.agreement import cache_contract
    from agssd.data_modules.probe_set import read_in_model_range
    from agssd.evaluation.contract import check_contract
    from agssd.evaluation.probe_features import patch_labels, token_grid, window_attention, window_features

    rows = _choose(cache, count)
    infos = [cache.cases[row] for row in rows]
    if infos[0].channels != encoder.in_channels:
        raise ValueError(f"the cache has {infos[0].channels} channel(s), the encoder takes {encoder.in_channels}")
    check_contract(encoder.contract, cache_contract(infos), None, None)
    encoder, window = encoder.to(device), _window(run, encoder)
    found = []
    for row, info in zip(rows, infos, strict=True):
        start, size = _box(info)
        image = read_in_model_range(cache, row, start, size)
        body = cache.read(row, start, size, "foreground") != 0
        dims = encoder.spatial_dims
        parts = image.unbind(1) if dims == 2 else (image,)  # frames one by one
        tokens = torch.cat([window_features(encoder, part, window, _OVERLAP)[0] for part in parts])
        if not torch.isfinite(tokens).all():
            raise ValueError("the encoder gives features that are not finite; its weights have diverged")
        grid = (*size[:-dims], *token_grid(size[-dims:], encoder.patch_size, window))
        attention = None
        if encoder.has_cls_attention:
            rows_of = [window_attention(encoder, part, window, _OVERLAP) for part in parts]
            attention = torch.cat(rows_of).T.reshape(-1, *grid).numpy()
        bodies = torch.from_numpy(body).view(-1, *size[-dims:])  # of each part
        labels = torch.cat([patch_labels(part, encoder.patch_size, window) for part in bodies])
        share = (labels == 1).float().mean(1)
        inside = (share >= _MIN_FOREGROUND).reshape(grid).numpy()
        colours = np.zeros((*grid, 3), np.float32)
        found.append(
            Encoded(info, start, image[0].numpy(), body, grid, inside, tokens.numpy(), attention, colours, colours)
        )
    return found


def colour_by_components(cases: Sequence[Encoded]) -> list[float]:
    """Set the colours of every case by the first three principal components of its tokens on the body.

    Returns:
        The share of the variance over all cases that each of the three explains.
    """
    colours, shares = components(cases)
    for case, shared in zip(cases, colours, strict=True):
        case.colours, case.own_colours = shared, components([case])[0][0]
    return shares


def components(cases: Sequence[Encoded]) -> tuple[list[Floats], list[float]]:
    """Return (D', H', W', 3) in [0, 1] per case, each axis from its 1st to its 99th percentile, and variance shares."""
    tokens = np.concatenate([case.tokens[case.inside.reshape(-1)] for case in cases]).astype(np.float64)
    if len(tokens) < 4:  # hardly any body
        tokens = np.concatenate([case.tokens for case in cases]).astype(np.float64)
    mean = tokens.mean(0)
    values, vectors = np.linalg.eigh(np.cov(tokens - mean, rowvar=False))
    axes = vectors[:, ::-1][:, :3]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), range(axes.shape[1])])  # the sign is anyone's choice
    low, high = np.percentile((tokens - mean) @ axes, (1, 99), axis=0)
    found = []
    for case in cases:
        scaled = ((case.tokens - mean) @ axes - low) / np.maximum(high - low, 1e-12)
        found.append(np.clip(scaled, 0, 1).reshape(*case.grid, 3).astype(np.float32))
    total = max(float(values.sum()), 1e-12)
    return found, [float(value) / total for value in values[::-1][:3]]


def case_viewer(number: int, case: Encoded, patch: Size) -> str:
    """Return the viewer of one case."""
    factor = shrink_factors(case.image.shape, case.info.spatial_dims)
    image, body = shrunk(case.image, factor), shrunk(case.body, factor, average=False)
    cells = _cells(patch)
    step = (cells[0] / factor[0], cells[1] / factor[1], cells[2] / factor[2])
    layers = []
    for name, colours in (("all cases", case.colours), ("this case", case.own_colours)):
        legend = [(f"red, green, blue: first, second and third component over {name}", "")]
        values = (colours * 255).round().astype(np.uint8)
        layers.append(Layer(f"PCA of patch tokens, {name}", "rgb", values, step, case.inside, legend))
    for name, attention in _attention_maps(case):
        low, high = np.percentile(attention[case.inside], (1, 99)) if case.inside.any() else (0.0, 1.0)
        heat = np.clip((attention - low) / max(float(high - low), 1e-6), 0, 1) * 255
        legend = [(f"black {low:.2f}", "#000004"), (f"yellow {high:.2f}; 1 is no preference", "#fcffa4")]
        layers.append(Layer(name, "heat", heat.round().astype(np.uint8), step, case.inside, legend))
    layers.append(Layer("nothing"))
    middle = [int(np.median(found)) for found in np.nonzero(body)] if body.any() else [n // 2 for n in image.shape]
    d, h, w = (size * step for size, step in zip(case.info.spacing_mm, factor, strict=True))
    key = short_key(case.info.key)
    title = f"Case {number + 1}{f' ({key})' if key else ''}, {case.info.modality.upper()}, split {case.info.split}"
    start = (min(middle[0], image.shape[0] - 1), middle[1], middle[2])
    grey, frames = as_grey(image.astype(np.float32), body), case.info.spatial_dims == 2
    return viewer(number, title, grey, (d, h, w), start, layers, 0, body, frames)


def write_nifti(case: Encoded, patch: Size, folder: Path) -> list[Path]:
    """Write ``KEY_pca.nii.gz`` and ``KEY_attention.nii.gz`` on the source's own voxels and return their paths.

    The components are (i, j, k, 3) float32 in [0, 1], attention is (i, j, k) float32, mean over heads, 1 = no
    preference. Between tokens both are interpolated linearly; 0 outside what was encoded.

    Raises:
        ValueError: if the place cannot be written.
    """
    from agssd.evaluation.predictions import resample_to_source, save_nifti

    tokens = _Placed(case.info, _moved(case.info.affine, case.start, _cells(patch)))
    voxels = _Placed(case.info, _moved(case.info.affine, case.start, (1, 1, 1)))
    inside = resample_to_source(np.ones(case.image.shape, np.float32), voxels, 0, 0.0)
    stem = case.info.key.replace("/", "_")

    def moved(values: Floats) -> NDArray[Any]:
        kept: NDArray[Any] = resample_to_source(values, tokens, 1, 0.0) * inside
        return kept

    written = [folder / f"{stem}_pca.nii.gz"]
    save_nifti(np.stack([moved(case.colours[..., c]) for c in range(3)], -1), case.info.source_affine, written[0])
    if case.attention is not None:
        written.append(folder / f"{stem}_attention.nii.gz")
        save_nifti(moved(case.attention.mean(0)), case.info.source_affine, written[1])
    return written


class _Placed:
    """The geometry of an array of a case that lies on another grid than the cache's voxels."""

    def __init__(self, info: CaseInfo, affine: list[list[float]]) -> None:
        self.key, self.affine = info.key, affine
        self.source_affine, self.source_shape = info.source_affine, info.source_shape


def _cells(patch: Size) -> Triple:
    """Return the voxels of a token per axis of the cache; a token of a frame lies in one."""
    depth, height, width = (1, *patch)[-3:]
    return depth, height, width


def _moved(affine: Sequence[Sequence[float]], start: Triple, step: Triple) -> list[list[float]]:
    """Return the affine of blocks of ``step`` voxels, the first of which begins at voxel ``start``."""
    block = np.diag([*map(float, step), 1.0])
    block[:3, 3] = [first + (size - 1) / 2 for first, size in zip(start, step, strict=True)]
    moved: list[list[float]] = (np.asarray(affine, np.float64) @ block).tolist()
    return moved


def _attention_maps(case: Encoded) -> list[tuple[str, Floats]]:
    if case.attention is None:
        return []
    heads = [(f"[CLS] attention, head {n + 1}", head) for n, head in enumerate(case.attention)]
    return [("[CLS] attention, mean of heads", case.attention.mean(0)), *(heads if len(heads) > 1 else [])]


def _choose(cache: VolumeCache, count: int) -> list[int]:
    """Return ``count`` cases spread over the first of the splits val, test, train that is not empty."""
    rows = next((found for split in ("val", "test", "train") if (found := cache.select(split=split))), [])
    if not rows:
        raise ValueError("the cache has no cases")
    return [
        rows[index] for index in np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))
    ]


def _box(info: CaseInfo) -> tuple[Triple, Triple]:
    """Return start and size of what is encoded: all of it, or ``MAX_VOX`` voxels around the middle of the body."""
    starts, sizes = [], []
    for whole, (low, high), most in zip(info.shape, info.foreground_box, MAX_VOX[info.spatial_dims], strict=True):
        size = min(whole, most)
        starts.append(min(max((low + high - size) // 2, 0), whole - size))
        sizes.append(size)
    return (starts[0], starts[1], starts[2]), (sizes[0], sizes[1], sizes[2])


def _window(run: Run, encoder: Backbone) -> Size:
    """Return the size of view the encoder was trained on: of the run's views or crops, else 4 patches per axis."""
    patch = encoder.patch_size
    sizes = (run.setting("views", "init_args", "size_vox"), run.setting("model", "init_args", "crop_vox"))
    for size in sizes:
        fits = isinstance(size, list) and len(size) == len(patch)
        if fits and all(s % p == 0 for s, p in zip(size, patch, strict=True)):
            return tuple(size)
    return tuple(4 * n for n in patch)
