"""Random numbers as a function of (seed, sample, purpose), drawn for a whole batch on the device.

A sample gets the same numbers whichever worker, rank, micro-batch or device it is met on, so no random choice depends
on how the batch is cut (docs/method.md §1.5, ours). Counter-based: a hash of a key and a counter, no state.

Source: the mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), written for int64
tensors, whose products wrap.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int64 right without copying the sign."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Mix x, which nobody else holds, in place: half the time of new tensors on a CPU."""
    x.bitwise_xor_(_shift_right(x, 30)).mul_(_MIX_1)
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_MIX_2)
    return x.bitwise_xor_(_shift_right(x, 31))


class KeyedRandom:
    """A stream of numbers per sample, for one purpose.

    Two streams with different ``purpose`` are independent; drawing twice from one object continues its stream.

    Args:
        seed: seed of the run.
        sample: (B,) int64, the samples' positions in the endless stream.
        purpose: name of what is drawn, for example ``"mask"``.
    """

    def __init__(self, seed: int, sample: Tensor, purpose: str) -> None:
        key = _mix(sample.new_full((), seed, dtype=torch.int64) * _GOLDEN + zlib.crc32(purpose.encode()))
        self._key = _mix(_mix(sample.to(torch.int64) * _GOLDEN + key) + key)  # (B,)
        self._drawn = 0

    @classmethod
    def from_keys(cls, keys: Tensor) -> KeyedRandom:
        """Return streams of the keys (B,) int64 of :meth:`split`."""
        stream = cls.__new__(cls)
        stream._key, stream._drawn = keys, 0
        return stream

    def split(self, parts: int) -> Tensor:
        """Return (B * parts,) int64: keys of independent streams, parts of a sample next to each other."""
        counter = torch.arange(self._drawn + 1, self._drawn + parts + 1, device=self._key.device)
        self._drawn += parts
        return _mix(self._key[:, None] + counter * _GOLDEN).flatten()

    def uniform(self, *shape: int) -> Tensor:
        """Return (B, *shape) float32, uniform in the open interval (0, 1)."""
        count = math.prod(shape)
        counter = torch.arange(self._drawn + 1, self._drawn + count + 1, device=self._key.device)
        self._drawn += count
        bits = _shift_right(_mix(self._key[:, None] + counter * _GOLDEN), 41)  # (B, count), 23 bits
        return bits.to(torch.float32).add_(0.5).mul_(2.0**-23).reshape(-1, *shape)

    def of_numbers(self, numbers: Tensor) -> Tensor:
        """Return (B, n) float32, uniform in (0, 1): one draw per integer of ``numbers`` (B, n)."""
        keys = self.split(1)[:, None] ^ (numbers.long() + 1) * 0x5851F42D4C957F2D
        return KeyedRandom.from_keys(keys.flatten()).uniform(1).view(numbers.shape)

    def normal(self, *shape: int) -> Tensor:
        """Return (B, *shape) float32, standard normal (Box-Muller: two of each pair of uniform numbers)."""
        count = math.prod(shape)
        half = (count + 1) // 2
        radius = self.uniform(half).log_().mul_(-2.0).sqrt_()
        angle = self.uniform(half).mul_(2.0 * math.pi)
        both = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
        return both[:, :count].reshape(-1, *shape)

    def gumbel(self, *shape: int) -> Tensor:
        """Return (B, *shape) float32, standard Gumbel.

        Added to log-weights, its top k are a draw of k without replacement.
        """
        return -(-self.uniform(*shape).log()).log()

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        """Return (B, *shape) float32, uniform in (low, high)."""
        return low + (high - low) * self.uniform(*shape)


def drop_path_noise(seed: int, sample: Tensor, depth: int, num_views: tuple[int, ...]) -> list[Tensor | None]:
    """Return uniforms for stochastic depth per group of views: (B * views, depth), views of a sample side by side.

    Args:
        seed: seed of the run.
        sample: (B,) int64.
        depth: number of skippable blocks of the encoder.
        num_views: views per sample of each group.
    """
    noise = KeyedRandom(seed, sample, "drop path").uniform(sum(num_views), depth)
    return [part.flatten(0, 1) for part in noise.split(num_views, dim=1)]
