"""The stream of samples is a pure function of the seed and cuts without loss or overlap."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from agssd.data_modules.sampling import (
    MicroBatches,
    case_of_sample,
    check_padding,
    crop_start,
    micro_batch_size,
    padded_share,
)


def test_case_of_sample__every_pass_is_another_permutation() -> None:
    passes = [[case_of_sample(3, 7 * p + i, 7) for i in range(7)] for p in range(20)]
    assert all(sorted(order) == list(range(7)) for order in passes)
    assert len({tuple(order) for order in passes}) > 15


def test_case_of_sample__depends_on_seed_and_sample_alone() -> None:
    forward = [case_of_sample(1, n, 50) for n in range(200)]
    backward = [case_of_sample(1, n, 50) for n in reversed(range(200))][::-1]
    assert forward == backward
    assert forward != [case_of_sample(2, n, 50) for n in range(200)]


def test_crop_start__stays_inside_a_larger_volume_and_reaches_both_ends() -> None:
    chunks = np.ones((2, 2, 2))
    starts = np.array([crop_start(0, n, (40, 56, 40), (24, 24, 40), chunks, 0.5) for n in range(600)])
    assert (starts >= 0).all()
    assert (starts <= np.array([16, 32, 0])).all()
    assert (starts.min(0) == 0).all()
    assert (starts.max(0) == np.array([16, 32, 0])).all()


def test_crop_start__pads_a_smaller_volume_symmetrically() -> None:
    for n in range(50):
        start = crop_start(0, n, (20, 33, 64), (40, 40, 32), np.ones((1, 2, 2)), 0.7)
        assert start[0] == -10  # 10 before, 10 after
        assert start[1] == -3  # 3 before, 4 after
        assert 0 <= start[2] <= 32


def test_crop_start__foreground_crops_hold_the_foreground_chunk_and_others_are_uniform() -> None:
    chunks = np.zeros((4, 4, 4))
    chunks[3, 0, 2] = 0.4
    size, shape = 32, (128, 128, 128)
    biased = np.array([crop_start(0, n, shape, (size,) * 3, chunks, 1.0) for n in range(300)])
    centre = biased + size // 2
    assert ((centre[:, 0] >= 96) & (centre[:, 1] <= 32) & (centre[:, 2] >= 64) & (centre[:, 2] < 96)).all()
    uniform = np.array([crop_start(0, n, shape, (size,) * 3, chunks, 0.0) for n in range(4000)])
    # mean of a discrete uniform on [0, 96] is 48 with standard error 0.44 over 4000 draws
    assert np.abs(uniform.mean(0) - 48).max() < 2.0
    mixed = np.array([crop_start(0, n, shape, (size,) * 3, chunks, 0.5) for n in range(2000)])
    share = (np.abs(mixed + size // 2 - np.array([112, 16, 80])) <= 16).all(1).mean()
    assert 0.45 < share < 0.58


def test_crop_start__volume_without_foreground_falls_back_to_uniform() -> None:
    starts = {crop_start(0, n, (64, 64, 64), (32, 32, 32), np.zeros((2, 2, 2)), 1.0) for n in range(20)}
    assert len(starts) > 15


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 3)])
def test_micro_batches__a_step_covers_the_same_samples_however_it_is_cut(world_size: int, accumulate: int) -> None:
    total = 24
    size = micro_batch_size(total, world_size, accumulate)
    ranks = [list(islice(MicroBatches(size, r, world_size), 3 * accumulate)) for r in range(world_size)]
    for step in range(3):
        drawn = [n for rank in ranks for batch in rank[step * accumulate : (step + 1) * accumulate] for n in batch]
        assert Counter(drawn) == Counter(range(step * total, (step + 1) * total))
    # within one micro-batch the ranks' contiguous slices join to the batch of one process
    joined = [n for rank in ranks for n in rank[0]]
    assert joined == list(range(size * world_size))


def test_micro_batches__continues_where_it_stopped() -> None:
    whole = list(islice(MicroBatches(2, 1, 2), 10))
    assert list(islice(MicroBatches(2, 1, 2, first_sample=16), 6)) == whole[4:]


def test_micro_batches__endless_stream_has_no_length_and_finite_pass_has() -> None:
    with pytest.raises(TypeError, match="endless"):
        len(MicroBatches(2, 0, 1))
    finite = MicroBatches(2, 1, 2, num_samples=12)
    assert len(finite) == 3
    assert list(finite) == [[2, 3], [6, 7], [10, 11]]


def test_micro_batches__refuses_a_start_inside_a_micro_batch() -> None:
    with pytest.raises(ValueError, match="first_sample is 6"):
        MicroBatches(2, 0, 2, first_sample=6)


def test_micro_batch_size__refuses_a_remainder() -> None:
    assert micro_batch_size(16, 2, 4) == 2
    with pytest.raises(ValueError, match=r"global_batch_size 16 .* 3 device"):
        micro_batch_size(16, 3, 1)
    with pytest.raises(ValueError, match="global_batch_size 0"):
        micro_batch_size(0, 1, 1)


def test_padded_share__equals_counting_voxels() -> None:
    shape, parent = (20, 50, 30), (32, 40, 32)
    start = crop_start(0, 0, shape, parent, np.ones((1, 2, 1)), 0.0)
    inside = np.ones(parent, bool)
    for axis, index in enumerate(np.ogrid[tuple(slice(0, p) for p in parent)]):
        inside &= (index + start[axis] >= 0) & (index + start[axis] < shape[axis])
    assert padded_share(shape, parent) == pytest.approx(1 - inside.mean(), abs=1e-12)


def test_check_padding__judges_by_the_majority_of_volumes() -> None:
    small, large = (20, 20, 20), (64, 64, 64)
    check_padding([small, large], (32, 32, 32))
    with pytest.raises(ValueError, match=r"2 of 3 .*\[20, 20, 20\]"):
        check_padding([small, small, large], (32, 32, 32))
