"""Which case and which crop belong to sample ``n`` of an endless stream, and which samples belong to which rank.

Everything here is a pure function of ``(seed, n)``: neither the number of workers, ranks or micro-batches nor an
interruption can change what sample ``n`` is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from agssd.types import Triple

_PASS_STREAM, _CROP_STREAM = 0, 1
CHUNK_VOX = 32  # edge of the cache's chunks, to which ``foreground_chunks`` refers


def keyed_generator(*key: int) -> np.random.Generator:
    """Return a generator that depends on ``key`` (non-negative integers) alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


@lru_cache(maxsize=64)
def pass_order(seed: int, pass_number: int, num_cases: int, source: int) -> np.ndarray:
    """Return the cases of one pass over a source in their order."""
    return keyed_generator(seed, _PASS_STREAM, pass_number, source).permutation(num_cases)


def case_of_sample(seed: int, sample: int, num_cases: int, source: int = 0) -> int:
    """Return the case in [0, num_cases) of sample ``sample``.

    Every pass of ``num_cases`` samples is a permutation of the cases, so each case weighs the same whatever cache it
    came from; the permutation is a function of (seed, number of the pass, source).
    """
    pass_number, position = divmod(sample, num_cases)
    return int(pass_order(seed, pass_number, num_cases, source)[position])


def crop_start(
    seed: int,
    sample: int,
    shape: Triple,
    parent_vox: Triple,
    foreground_chunks: np.ndarray,
    prob_foreground: float,
) -> Triple:
    """Return the first voxel (D, H, W) of the parent crop of sample ``sample``; negative where the crop is padded.

    With probability ``prob_foreground`` the crop is centred on a voxel of a chunk drawn in proportion to its voxels of
    foreground, else it lies uniformly in the volume; nothing is decoded for it. The crop leaves the volume only on
    axes on which it is larger than the volume, and there the padding is the same on both sides (the odd voxel
    goes to the far side).

    Args:
        seed: seed of the stream, non-negative.
        sample: number of the sample in the stream.
        shape: volume in voxels.
        parent_vox: crop in voxels.
        foreground_chunks: (cD, cH, cW) float, share of foreground in each chunk of 32 voxels.
        prob_foreground: in [0, 1].
    """
    rng = keyed_generator(seed, _CROP_STREAM, sample)
    room = [volume - crop for volume, crop in zip(shape, parent_vox, strict=True)]
    uniform = [int(rng.integers(0, max(free, 0) + 1)) for free in room]
    weights = np.asarray(foreground_chunks, dtype=np.float64)
    for axis, length in enumerate(shape):  # the last chunk of an axis may be thin
        voxels = np.minimum(CHUNK_VOX, length - CHUNK_VOX * np.arange(weights.shape[axis]))
        weights = weights * voxels.reshape(-1, *([1] * (2 - axis)))
    cumulated = np.cumsum(weights)
    if rng.random() < prob_foreground and cumulated[-1] > 0:
        # side="right" never lands on a chunk of weight 0
        flat = int(np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right"))
        chunk = np.unravel_index(min(flat, weights.size - 1), foreground_chunks.shape)
        centre = [
            int(rng.integers(c * CHUNK_VOX, min((c + 1) * CHUNK_VOX, volume)))
            for c, volume in zip((int(i) for i in chunk), shape, strict=True)
        ]
        wanted = [
            min(max(c - crop // 2, 0), max(free, 0)) for c, crop, free in zip(centre, parent_vox, room, strict=True)
        ]
    else:
        wanted = uniform
    start = [inside if free >= 0 else -((-free) // 2) for inside, free in zip(wanted, room, strict=True)]
    return (start[0], start[1], start[2])


def padded_share(shape: Triple, parent_vox: Triple) -> float:
    """Return the share of a parent crop that lies outside a volume of ``shape``, in [0, 1)."""
    inside = math.prod(min(volume, crop) for volume, crop in zip(shape, parent_vox, strict=True))
    return 1.0 - inside / math.prod(parent_vox)


def micro_batch_size(global_batch_size: int, world_size: int, accumulate: int) -> int:
    """Return the samples per rank and micro-batch, ``global_batch_size / (world_size * accumulate)``.

    Raises:
        ValueError: if there is a remainder, because another batch would be another experiment.
    """
    parts = world_size * accumulate
    if global_batch_size < 1 or global_batch_size % parts:
        raise ValueError(
            f"data.global_batch_size {global_batch_size} cannot be divided by {world_size} device(s) x "
            f"{accumulate} accumulated batch(es) = {parts}; change trainer.devices or "
            "trainer.accumulate_grad_batches so that it can, or change the global batch knowingly"
        )
    return global_batch_size // parts


class MicroBatches:
    """The batches of one rank: global micro-batch ``m`` is samples ``[m * W * b, (m + 1) * W * b)``, cut by rank.

    Rank ``r`` takes the ``r``-th contiguous slice of ``b`` samples. The micro-batches of one accumulated optimiser
    step follow each other, so a step always covers the same ``global_batch_size`` samples however it is cut.

    Args:
        batch_size: samples per rank and micro-batch, ``b``.
        rank: this rank, ``r``.
        world_size: number of ranks, ``W``.
        first_sample: sample at which the stream starts; a multiple of ``W * b``.
        num_samples: length of a finite pass (a multiple of ``W * b``); None for the endless stream, which has no
            length.

    Raises:
        ValueError: if ``first_sample`` or ``num_samples`` is no whole number of global micro-batches.
    """

    def __init__(
        self, batch_size: int, rank: int, world_size: int, first_sample: int = 0, num_samples: int | None = None
    ) -> None:
        """Check that the pass is cut without remainder."""
        step = batch_size * world_size
        for name, value in (("first_sample", first_sample), ("num_samples", num_samples or 0)):
            if value % step:
                raise ValueError(
                    f"{name} is {value}, which is no multiple of the {step} samples of a global micro-batch"
                )
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.first_sample = first_sample
        self.num_samples = num_samples

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the sample numbers of one micro-batch after another."""
        step = self.batch_size * self.world_size
        base = self.first_sample
        while self.num_samples is None or base < self.first_sample + self.num_samples:
            mine = base + self.rank * self.batch_size
            yield list(range(mine, mine + self.batch_size))
            base += step

    def __len__(self) -> int:
        """Return the number of batches of a finite pass.

        Raises:
            TypeError: for the endless stream; torch and Lightning read this as "no length".
        """
        if self.num_samples is None:
            raise TypeError("the training stream is endless and has no length")
        return self.num_samples // (self.batch_size * self.world_size)


def check_padding(shapes: Sequence[Triple], parent_vox: Triple) -> None:
    """Refuse a parent crop of which more than half would be padding for more than half of the volumes.

    Raises:
        ValueError: naming the crop, the typical volume and the remedy.
    """
    mostly_padding = [shape for shape in shapes if padded_share(shape, parent_vox) > 0.5]
    if 2 * len(mostly_padding) > len(shapes):
        median = tuple(int(v) for v in np.median(np.asarray(shapes), axis=0))
        raise ValueError(
            f"data.parent_vox {list(parent_vox)} is too large for these volumes: more than half of the crop would be "
            f"padding for {len(mostly_padding)} of {len(shapes)} training volumes (median shape {list(median)}); "
            "choose a smaller data.parent_vox (and views), a finer spacing in `agssd prepare`, or the experiment that "
            "was made for small volumes (conf/experiment/agssd_small.yaml)"
        )
