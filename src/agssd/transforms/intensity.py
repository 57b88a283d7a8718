"""Intensities: into the model's range, and appearance augmentation batched on the device.

Every augmentation draws per sample and view from a :class:`~agssd.transforms.keyed_random.KeyedRandom`, works on the
whole batch at once and needs no host synchronisation. Source of the list: 3DINO's augmentations [R: 3DINO], strengths
ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import reduce

import torch
from torch import Tensor

from agssd.geometry import per_sample
from agssd.transforms.keyed_random import KeyedRandom
from agssd.transforms.separable import smooth


def to_model_range(image: Tensor, low: Tensor, high: Tensor, is_ct: Tensor) -> Tensor:
    """Return intensities in the model's range, clipped: CT in [0, 1] (air 0), MRI in [-1, 1] (background -1).

    Source: CT [R: S2DC, SPECTRE], MRI [R: 3DINO].

    Args:
        image: (B, C, [D,] H, W) float32, HU for CT, source units for MRI.
        low: (B, C) float32, the intensity that maps to the low end (CT: -1000 HU).
        high: (B, C) float32, the intensity that maps to the high end (CT: 1000 HU).
        is_ct: (B,) bool.
    """
    floor, span = _model_range(is_ct)
    unit = (image - per_sample(low, image)).div_(per_sample((high - low).clamp_min(1e-6), image)).clamp_(0, 1)
    return unit.mul_(per_sample(span, unit)).add_(per_sample(floor, unit))


def from_model_range(image: Tensor, low: Tensor, high: Tensor, is_ct: Tensor) -> Tensor:
    """Return HU for CT, source units for MRI: what :func:`to_model_range` made ``image`` of, where it did not clip.

    Args:
        image: (B, C, [D,] H, W) float32 in the model's range.
        low: (B, C) float32, as there.
        high: (B, C) float32, as there.
        is_ct: (B,) bool.

    Returns:
        (B, C, [D,] H, W) float32.
    """
    floor, span = (per_sample(x, low) for x in _model_range(is_ct))
    slope = (high - low) / span
    return torch.addcmul(per_sample(low - floor * slope, image), image, per_sample(slope, image))


def _model_range(is_ct: Tensor) -> tuple[Tensor, Tensor]:
    """Return the low end of the model's range and its width, (B,) each."""
    return torch.where(is_ct, 0.0, -1.0), torch.where(is_ct, 1.0, 2.0)


class Appearance:
    """Random appearance of a view: gamma, histogram shift, blur or sharpening, noise, Gibbs ringing (MRI only).

    Args:
        prob_gamma: share of views whose intensities are raised to a power in (1/``gamma``, ``gamma``).
        gamma: largest power.
        prob_histogram: share of views with a smooth monotone change of the intensity histogram.
        prob_blur: share of views that are blurred (half of them) or sharpened (the other half).
        blur_vox: largest standard deviation of the blur in voxels.
        prob_noise: share of views with Gaussian noise.
        noise: largest standard deviation of the noise, in units of the model's range.
        prob_gibbs: share of views other than CT whose highest spatial frequencies are cut; 0 for ultrasound.
        prob_speckle: share of views with multiplicative speckle, for ultrasound as the next two; their form is ours.
        speckle: largest standard deviation of the speckle, as a share of the intensity.
        prob_depth_gain: share of views whose gain changes smoothly along H, the depth.
        depth_gain: largest logarithm of each of the two parts of that change.
        prob_shadow: share of views with one acoustic shadow: a slanted band that begins at some depth.
        shadow: largest share of the intensity that it takes away.

    Raises:
        ValueError: if a share is no probability, or a strength is below the one that changes nothing.
    """

    def __init__(
        self,
        prob_gamma: float = 0.3,
        gamma: float = 1.25,
        prob_histogram: float = 0.3,
        prob_blur: float = 0.3,
        blur_vox: float = 1.0,
        prob_noise: float = 0.3,
        noise: float = 0.05,
        prob_gibbs: float = 0.1,
        prob_speckle: float = 0.0,
        speckle: float = 0.4,
        prob_depth_gain: float = 0.0,
        depth_gain: float = 0.4,
        prob_shadow: float = 0.0,
        shadow: float = 0.8,
    ) -> None:
        shares = {"gamma": prob_gamma, "histogram": prob_histogram, "blur": prob_blur, "noise": prob_noise}
        shares |= {"speckle": prob_speckle, "depth_gain": prob_depth_gain, "shadow": prob_shadow}
        for name, share in (shares | {"gibbs": prob_gibbs}).items():
            if not 0 <= share <= 1:
                raise ValueError(f"appearance.prob_{name} is {share}; give a probability, 0 to 1")
        strengths = {
            "blur_vox": blur_vox,
            "noise": noise,
            "speckle": speckle,
            "depth_gain": depth_gain,
            "shadow": shadow,
        }
        for name, strength, least in (("gamma", gamma, 1), *((name, value, 0) for name, value in strengths.items())):
            if strength < least:
                raise ValueError(f"appearance.{name} is {strength}; give at least {least}, which changes nothing")
        if shadow > 1:
            raise ValueError(f"appearance.shadow is {shadow}; give a share, 0 to 1")
        self.prob_gamma = prob_gamma
        self.gamma = gamma
        self.prob_histogram = prob_histogram
        self.prob_blur = prob_blur
        self.blur_vox = blur_vox
        self.prob_noise = prob_noise
        self.noise = noise
        self.prob_gibbs = prob_gibbs
        self.prob_speckle = prob_speckle
        self.speckle = speckle
        self.prob_depth_gain = prob_depth_gain
        self.depth_gain = depth_gain
        self.prob_shadow = prob_shadow
        self.shadow = shadow

    @classmethod
    def of(cls, settings: Mapping[str, float] | None) -> Appearance:
        """Return the augmentation of a recipe's ``appearance``, the settings that differ from the defaults.

        Raises:
            ValueError: if a setting is unknown or out of range.
        """
        known = list(inspect.signature(cls).parameters)
        for name in settings or {}:
            if name not in known:
                raise ValueError(f"appearance.{name} is unknown; choose from {', '.join(known)}")
        return cls(**(settings or {}))

    def __call__(
        self, image: Tensor, is_ct: Tensor, random: KeyedRandom, views: int, which: Tensor | None = None
    ) -> Tensor:
        """Return the views with a new appearance.

        Args:
            image: (B*V, C, [D,] H, W) float32 in the model's range, views of a sample next to each other; or R of them.
            is_ct: (B*V,) or (R,) bool.
            random: keyed by the B samples.
            views: V.
            which: (R,) int64, where ``image`` holds some views only: the rows of the B*V that they are. They look as
                they would among all.
        """

        def rows(drawn: Tensor) -> Tensor:
            return drawn if which is None else drawn[which]

        def draw(low: float = 0.0, high: float = 1.0) -> Tensor:
            return rows(random.between(low, high, views).flatten())

        floor, span = _model_range(is_ct)
        unit = (image - per_sample(floor, image)).div_(per_sample(span, image))

        power = torch.where(draw() < self.prob_gamma, self.gamma ** draw(-1.0, 1.0), torch.ones_like(span))
        # A smooth monotone change: x + a sin(pi x) + b sin(2 pi x), with a and b too small to turn its slope.
        chosen, first, second = draw() < self.prob_histogram, draw(-0.05, 0.05), draw(-0.025, 0.025)
        unit = unit.clamp_(1e-4, 1) ** per_sample(power, unit)

        def bend(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
            first, second = per_sample(first, x), per_sample(second, x)
            return x + first * (torch.pi * x).sin() + second * (2 * torch.pi * x).sin()

        unit = apply_where(chosen, bend, unit, first, second)

        chosen, sharpen, width = draw() < self.prob_blur, draw() < 0.5, draw(0.3, 1.0) * self.blur_vox
        amount = torch.where(sharpen, -0.5, 1.0)

        def blur(x: Tensor, amount: Tensor, width: Tensor) -> Tensor:
            return x + per_sample(amount, x) * (smooth(x, width[:, None].expand(-1, x.ndim - 2)) - x)

        unit = apply_where(chosen, blur, unit, amount, width)
        chosen, keep = (draw() < self.prob_gibbs) & ~is_ct, draw(0.5, 0.9)
        unit = apply_where(chosen, _cut_frequencies, unit, keep)

        chosen, level = draw() < self.prob_noise, draw(0.0, self.noise)
        keys = rows(random.split(views))

        def add_noise(x: Tensor, level: Tensor, keys: Tensor) -> Tensor:
            return x + per_sample(level, x) * KeyedRandom.from_keys(keys).normal(*x.shape[1:])

        unit = apply_where(chosen, add_noise, unit, level, keys)
        if self.prob_depth_gain:
            first, second = draw(-self.depth_gain, self.depth_gain), draw(-self.depth_gain, self.depth_gain)
            unit = apply_where(draw() < self.prob_depth_gain, change_depth_gain, unit, first, second)
        if self.prob_shadow:
            place = (draw(), draw(-0.3, 0.3), draw(0.02, 0.1), draw(0.0, 0.7), draw(0.3, 1.0) * self.shadow)
            unit = apply_where(draw() < self.prob_shadow, cast_shadow, unit, *place)
        if self.prob_speckle:
            unit = apply_where(
                draw() < self.prob_speckle, add_speckle, unit, draw(0.0, self.speckle), rows(random.split(views))
            )
        return unit.clamp(0, 1).mul_(per_sample(span, unit)).add_(per_sample(floor, unit))


def apply_where(chosen: Tensor, change: Callable[..., Tensor], image: Tensor, *settings: Tensor) -> Tensor:
    """Return the image (B, ...) changed where ``chosen`` (B,) says so; settings are per view.

    On the CPU only the chosen views are computed; on a device all are, since selecting would make the host wait.
    """
    if image.device.type != "cpu":
        return torch.where(per_sample(chosen, image), change(image, *settings), image)
    index = chosen.nonzero()[:, 0]
    return image.index_copy(0, index, change(image[index], *(x[index] for x in settings))) if len(index) else image


def change_depth_gain(unit: Tensor, bow: Tensor, slope: Tensor) -> Tensor:
    """Return images (B, ..., H, W) times ``exp(bow sin(pi u) + slope (2 u - 1))``, u from 0 to 1 along H; (B,) each."""
    u = torch.linspace(0, 1, unit.shape[-2], device=unit.device)[:, None]
    bow, slope = per_sample(bow, unit), per_sample(slope, unit)
    return unit * (bow * (torch.pi * u).sin() + slope * (2 * u - 1)).exp()


def cast_shadow(unit: Tensor, centre: Tensor, slant: Tensor, width: Tensor, start: Tensor, depth: Tensor) -> Tensor:
    """Return images (B, ..., H, W) darkened in a band along H.

    Args:
        unit: (B, ..., H, W) float32 in [0, 1].
        centre: (B,) of the band at the top, as a share of W.
        slant: (B,) how far it moves over all of H, as a share of W.
        width: (B,) of the band, as a share of W.
        start: (B,) where it begins, as a share of H.
        depth: (B,) share of the intensity that it takes away.
    """
    down = torch.linspace(0, 1, unit.shape[-2], device=unit.device)[:, None]
    across = torch.linspace(0, 1, unit.shape[-1], device=unit.device)
    centre, slant, width, start, depth = (per_sample(x, unit) for x in (centre, slant, width, start, depth))
    band = (-(((across - centre - slant * down) / width) ** 4)).exp()
    return unit * (1 - depth * band * ((down - start) / 0.03).sigmoid())


def add_speckle(unit: Tensor, level: Tensor, keys: Tensor) -> Tensor:
    """Return images (B, ..., H, W) times ``1 + level n``, n normal, with grains of about two pixels; (B,) each."""
    grain = KeyedRandom.from_keys(keys).normal(*unit.shape[1:])
    grain = smooth(grain, grain.new_ones(len(grain), grain.ndim - 2))
    grain = grain / per_sample(grain.flatten(1).std(1), grain)
    return unit * (1 + per_sample(level, unit) * grain).clamp_min(0)


def _cut_frequencies(image: Tensor, keep: Tensor) -> Tensor:
    """Return the images (B, C, [D,] H, W) without frequencies above ``keep`` (B,) of Nyquist; 2 keeps all."""
    *others, last = image.shape[2:]
    dims = tuple(range(2, image.ndim))
    spectrum = torch.fft.rfftn(image, dim=dims)
    frequencies = [torch.fft.fftfreq(n, device=image.device) for n in others]
    frequencies.append(torch.fft.rfftfreq(last, device=image.device))
    squares = torch.meshgrid(*((2 * frequency) ** 2 for frequency in frequencies), indexing="ij")
    radius = reduce(torch.add, squares).sqrt()
    filtered: Tensor = torch.fft.irfftn(spectrum * (radius <= per_sample(keep, image)), s=image.shape[2:], dim=dims)
    return filtered
