"""Random numbers depend on seed, sample and purpose alone, and are as random as they claim."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from agssd.transforms.keyed_random import KeyedRandom, _mix

SAMPLES = torch.arange(4096)


def test_mix__is_splitmix64():
    # First outputs of the published SplitMix64 generator with seed 0: the finaliser of multiples of the golden gamma.
    golden = 0x9E3779B97F4A7C15
    state = torch.tensor([(golden * n % 2**64 + 2**63) % 2**64 - 2**63 for n in (1, 2, 3)])
    wanted = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [value % 2**64 for value in _mix(state).tolist()] == wanted


@pytest.mark.parametrize("cut", [[4096], [1] * 8 + [4088], [1000, 3096]])
def test_keyed_random__same_numbers_however_the_batch_is_cut(cut):
    def draw(sample):
        random = KeyedRandom(7, sample, "mask")
        return torch.cat([random.uniform(3, 2).flatten(1), random.normal(5), random.gumbel(2)], 1)

    whole = draw(SAMPLES)
    assert torch.equal(torch.cat([draw(part) for part in SAMPLES.split(cut)]), whole)
    order = torch.randperm(4096, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(SAMPLES[order]), whole[order])


def test_keyed_random__a_stream_goes_on_and_restarts_with_a_new_object():
    random = KeyedRandom(0, SAMPLES, "views")
    first, second = random.uniform(4), random.uniform(4)
    assert not (first == second).any(1).all()
    assert torch.equal(torch.cat([first, second], 1), KeyedRandom(0, SAMPLES, "views").uniform(8))


def test_keyed_random__streams_of_other_seed_purpose_and_sample_are_unrelated():
    reference = KeyedRandom(0, SAMPLES, "views").uniform(64).flatten()
    others = {
        "seed": KeyedRandom(1, SAMPLES, "views").uniform(64).flatten(),
        "purpose": KeyedRandom(0, SAMPLES, "mask").uniform(64).flatten(),
        "next sample": KeyedRandom(0, SAMPLES + 1, "views").uniform(64).flatten(),
        "far sample": KeyedRandom(0, SAMPLES + 2**40, "views").uniform(64).flatten(),
    }
    limit = 5 / math.sqrt(len(reference))  # five standard errors of a correlation of 0
    for name, other in others.items():
        assert abs(np.corrcoef(reference, other)[0, 1]) < limit, name
        assert (reference == other).float().mean() < 1e-4, name


def test_uniform__is_open_flat_and_uncorrelated_along_both_axes():
    u = KeyedRandom(3, SAMPLES, "x").uniform(64)
    assert u.min() > 0 and u.max() < 1
    count = u.numel()
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / count)
    assert abs(u.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / count)
    share = torch.histc(u, 64, 0, 1) / count
    chi2 = ((share * 64 - 1) ** 2).sum() * count / 64
    assert chi2 < 63 + 5 * math.sqrt(2 * 63)
    limit = 5 / math.sqrt(count)
    assert abs(np.corrcoef(u[:, 1:].flatten(), u[:, :-1].flatten())[0, 1]) < limit  # along the stream
    assert abs(np.corrcoef(u[1:].flatten(), u[:-1].flatten())[0, 1]) < limit  # along the samples
    assert len(u.unique()) > 0.95 * count  # 23 bits: 262,144 draws of 8.4 million values


def test_uniform__few_samples_and_long_streams_are_flat_too():
    u = KeyedRandom(0, torch.tensor([5]), "noise").uniform(200_000)[0]
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / 200_000)
    assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 5 / math.sqrt(200_000)


def test_normal__has_the_moments_and_tails_of_a_standard_normal():
    z = KeyedRandom(4, SAMPLES, "noise").normal(64).flatten().double()
    count = len(z)
    assert abs(z.mean()) < 5 / math.sqrt(count)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / count)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / count)
    for limit in (1.0, 2.0, 3.0):
        wanted = math.erfc(limit / math.sqrt(2))
        assert abs((z.abs() > limit).double().mean() - wanted) < 5 * math.sqrt(wanted / count)


def test_between__stays_in_its_range():
    x = KeyedRandom(0, SAMPLES, "x").between(-3.0, 5.0, 16)
    assert -3 <= x.min() < -2.99 and 4.99 < x.max() <= 5


def test_gumbel__largest_is_drawn_in_proportion_to_its_weight():
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = (weights.log() + KeyedRandom(1, torch.arange(60_000), "mask").gumbel(4)).argmax(1)
    share = torch.bincount(draws, minlength=4) / 60_000
    error = (weights * (1 - weights) / 60_000).sqrt()
    assert ((share - weights).abs() < 4.5 * error).all()


def test_gumbel__top_two_are_a_draw_without_replacement():
    weights = np.array([0.5, 0.3, 0.15, 0.05])
    keys = torch.from_numpy(np.log(weights)).float() + KeyedRandom(2, torch.arange(60_000), "mask").gumbel(4)
    pairs = keys.topk(2).indices
    for i in range(4):
        for j in range(4):
            if i == j:
                continue
            wanted = weights[i] * weights[j] / (1 - weights[i])
            share = ((pairs[:, 0] == i) & (pairs[:, 1] == j)).double().mean().item()
            assert abs(share - wanted) < 4.5 * math.sqrt(wanted * (1 - wanted) / 60_000)


def test_split__gives_unrelated_streams_that_do_not_depend_on_the_cut():
    def draw(sample):
        random = KeyedRandom(7, sample, "appearance")
        random.uniform(3)
        return KeyedRandom.from_keys(random.split(4)).uniform(16)

    whole = draw(SAMPLES)
    assert whole.shape == (4 * 4096, 16)
    assert torch.equal(torch.cat([draw(part) for part in SAMPLES.split(1000)]), whole)
    limit = 5 / math.sqrt(4096 * 16)
    streams = whole.reshape(4096, 4, 16)
    for other in range(1, 4):
        assert abs(np.corrcoef(streams[:, 0].flatten(), streams[:, other].flatten())[0, 1]) < limit
    parent = KeyedRandom(7, SAMPLES, "appearance")
    parent.uniform(3)
    parent.split(4)
    assert abs(np.corrcoef(parent.uniform(16).flatten(), streams[:, 0].flatten())[0, 1]) < limit
    again = KeyedRandom(7, SAMPLES[:8], "appearance")
    assert not torch.equal(again.split(2), again.split(2))  # a second split gives other streams


def test_of_numbers__equal_numbers_of_a_sample_get_equal_draws_and_others_independent_ones():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 2000, (3, 20000), generator=generator, dtype=torch.int32)
    sample = torch.arange(3)
    stream = KeyedRandom(0, sample, "a")
    first, second = stream.of_numbers(numbers), stream.of_numbers(numbers)
    assert first.dtype == torch.float32 and first.shape == numbers.shape and 0 < first.min() and first.max() < 1
    table = torch.zeros(3, 2000).scatter_(1, numbers.long(), first)
    assert torch.equal(table.gather(1, numbers.long()), first)
    assert abs(float(table.mean()) - 0.5) < 0.03 and abs(float(table.var()) - 1 / 12) < 0.01
    other = torch.zeros(3, 2000).scatter_(1, numbers.long(), second)
    for a, b in ((table[0], table[1]), (table[0], other[0]), (table[0, 1:], table[0, :-1])):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.1
    for b in range(3):
        assert torch.equal(KeyedRandom(0, sample[b : b + 1], "a").of_numbers(numbers[b : b + 1])[0], first[b])
