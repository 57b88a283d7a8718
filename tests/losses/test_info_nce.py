"""InfoNCE against plain NumPy, and against what half precision and small batches do to it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from agssd.losses.info_nce import KeyQueue, first_among_all, info_nce, region_info_nce


def rows(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def plain(queries: torch.Tensor, keys: torch.Tensor, temperature: float) -> float:
    """-log of each query's own share, written out in float64."""
    q, k = queries.double().numpy(), keys.double().numpy()
    total = 0.0
    for i in range(len(q)):
        similar = [q[i] @ k[j] / np.linalg.norm(q[i]) / np.linalg.norm(k[j]) / temperature for j in range(len(k))]
        total -= np.log(np.exp(similar[i]) / np.exp(similar).sum())
    return 2 * temperature * total / len(q)


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_info_nce__equals_numpy(temperature: float) -> None:
    queries, keys = rows(7, 12, 0), rows(7, 12, 1)
    assert info_nce(queries, keys, temperature).item() == pytest.approx(plain(queries, keys, temperature), rel=1e-5)


def test_info_nce__gradient_flows_to_queries_alone() -> None:
    queries, keys = rows(5, 8, 0).requires_grad_(), rows(5, 8, 1).requires_grad_()
    info_nce(queries, keys, 0.2).backward()
    assert queries.grad is not None and queries.grad.abs().sum(1).min() > 0
    assert keys.grad is None


def test_info_nce__is_smallest_where_each_finds_its_own() -> None:
    keys = torch.eye(6)
    own, others = info_nce(keys * 3, keys, 0.2), info_nce(keys.roll(1, 0), keys, 0.2)
    assert own.item() == pytest.approx(0.4 * np.log(1 + 5 * np.exp(-5)), rel=1e-5)
    assert others > own + 1.9  # 2 * temperature * (1 / temperature)
    assert info_nce(keys[:1], keys[:1], 0.2).item() == 0  # alone, without negatives


def test_info_nce__tiny_features_in_half_precision_keep_their_direction() -> None:
    # Defect of the family: the norm of small half-precision features underflows, and 1e-12 beside it as well.
    queries, keys = rows(6, 16, 0) * 1e-4, rows(6, 16, 1)
    given = info_nce(queries.half(), keys.half(), 0.2)
    assert given.item() == pytest.approx(plain(queries, keys, 0.2), rel=0.02)


# ------------------------------------------------------------------ queue


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def test_queue__loss_equals_numpy() -> None:
    queue = KeyQueue(20, 12)
    queue.observe(rows(9, 12, 2) + 2, torch.arange(9))
    queue.update()
    mean = unit(rows(9, 12, 2) + 2).double().numpy().mean(0)
    queries, keys = rows(5, 12, 0) + 1, 3 * rows(5, 12, 1)
    given = first_among_all(queue.cosines(queries, keys), 0.3)
    for i in range(5):
        q, k = (unit(x[i]).double().numpy() - mean for x in (queries, keys))
        others = [*queue.keys.double().numpy(), k]
        logits = np.array([q @ other / np.linalg.norm(q) / np.linalg.norm(other) for other in reversed(others)]) / 0.3
        assert given[i].item() == pytest.approx(np.log(np.exp(logits).sum()) - logits[0], rel=1e-5)


def test_queue__keys_are_as_long_as_queries_and_no_gradient_reaches_them() -> None:
    # Defect of S2DC's released code: the queue starts normalised, queries and later keys are not.
    queue = KeyQueue(6, 8)
    queries, keys = (100 * rows(4, 8, 0)).requires_grad_(), (1e-3 * rows(4, 8, 1)).requires_grad_()
    queue.observe(keys, torch.arange(4))
    queue.update()
    torch.testing.assert_close(queue.keys[:4], unit(keys.detach()))
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(6))
    longer = KeyQueue(6, 8)
    longer.observe(7 * keys, torch.arange(4))
    longer.update()
    torch.testing.assert_close(longer.cosines(queries, 3 * keys), queue.cosines(5 * queries, keys))
    assert queue.cosines(queries, keys).abs().max() <= 1 + 1e-6
    first_among_all(queue.cosines(queries, keys), 0.9).sum().backward()
    assert queries.grad is not None and keys.grad is None


def test_queue__what_all_samples_share_does_not_lower_the_loss() -> None:
    # Defect of the family: without batch norm all features run away from the queue's older keys together.
    own, away = rows(80, 16, 3), 8 * unit(rows(1, 16, 4))

    def last_loss(start: float, speed: float) -> float:
        queue = KeyQueue(40, 16)
        for step in range(10):
            keys = own[8 * step : 8 * step + 8] + away * (start + speed * step)
            loss = first_among_all(queue.cosines(keys, keys), 0.9).mean().item()
            queue.observe(keys, torch.arange(8 * step, 8 * step + 8))
            queue.update()
        return loss

    alone = last_loss(0, 0)
    assert last_loss(1, 0) == pytest.approx(alone, rel=0.01)
    assert last_loss(1, 0.05) > alone and last_loss(1, 0.2) > last_loss(1, 0.05)


def test_queue__mean_is_that_of_all_keys_first_and_of_the_last_steps_later() -> None:
    queue = KeyQueue(8, 4, momentum=0.5)
    expected = np.zeros(4)
    for step in range(6):
        keys = rows(3, 4, step)
        queue.observe(keys, torch.arange(3 * step, 3 * step + 3))
        queue.update()
        kept = min(step / (step + 1), 0.5)
        expected = kept * expected + (1 - kept) * unit(keys).double().numpy().mean(0)
        np.testing.assert_allclose(queue.mean.double().numpy(), expected, rtol=1e-5, atol=1e-7)


def held(queue: KeyQueue, keys: torch.Tensor) -> list[int]:
    """Return which of these directions the queue holds."""
    found: list[int] = ((keys @ queue.keys.T).amax(1) > 1 - 1e-5).nonzero()[:, 0].tolist()
    return found


def pairs_of_opposites(count: int, width: int) -> torch.Tensor:
    """Return (count, width) directions of which each two in turn add up to 0, so that their mean stays there."""
    one = unit(rows(count // 2, width, 0))
    return torch.stack([one, -one], 1).flatten(0, 1)


def test_queue__holds_the_last_keys_in_the_order_of_samples_however_they_came() -> None:
    samples = torch.arange(30)
    keys = pairs_of_opposites(30, 4)
    whole, cut = KeyQueue(8, 4, seed=1), KeyQueue(8, 4, seed=1)
    assert torch.equal(whole.keys, cut.keys) and whole.fill == 0  # the same start on every rank
    for step in range(5):  # 30 keys, 6 at a step
        own = samples[6 * step : 6 * step + 6]
        whole.observe(keys[own], own)
        for part in (own[3:], own[:3]):  # micro-batches, in another order
            cut.observe(keys[part], part)
            before = cut.keys.clone()
        assert torch.equal(cut.keys, before)
        whole.update()
        cut.update()
        assert held(whole, keys) == list(range(max(0, 6 * step - 2), 6 * step + 6))
        assert whole.fill == min(1, 6 * (step + 1) / 8)
    assert torch.equal(whole.keys, cut.keys) and whole.seen == 30
    cut.update()  # nothing new
    assert torch.equal(whole.keys, cut.keys)


def test_queue__of_more_keys_than_room_keeps_the_last() -> None:
    queue = KeyQueue(5, 4, seed=1)
    keys = pairs_of_opposites(12, 4)
    queue.observe(keys, torch.arange(12))
    queue.update()
    assert held(queue, keys) == list(range(7, 12))


def test_queue__is_refused_without_room() -> None:
    with pytest.raises(ValueError, match="queue_size is 0"):
        KeyQueue(0, 4)


# ------------------------------------------------------------------ regions


NUMBERS = torch.tensor([[[3, 9, 4], [9, 3, 5]], [[7, 7, 0], [7, 8, 8]], [[0, 0, 0], [0, 0, 0]]])


def plain_regions(queries: torch.Tensor, keys: torch.Tensor, numbers: torch.Tensor, temperature: float) -> float:
    """Each distinct region of each view finds itself in the other view, among distinct regions; loops in float64."""
    q, k = (x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=-1, keepdims=True) for x in (queries, keys))
    samples = []
    for b in range(len(q)):
        losses = []
        for v in (0, 1):
            for number in set(numbers[b, v].tolist()) - {0}:
                if number not in numbers[b, 1 - v]:
                    continue
                query = q[b, v, numbers[b, v].tolist().index(number)]
                total = 0.0
                for image in range(len(q)):
                    for view in (0, 1):
                        for other in set(numbers[image, view].tolist()) - {0}:
                            key = k[image, view, numbers[image, view].tolist().index(other)]
                            share = np.exp(query @ key / temperature)
                            if (image, other) != (b, number):
                                total += share
                            elif view != v:
                                own = share
                losses.append(-np.log(own / (own + total)))
        samples.append(np.mean(losses) if losses else 0.0)
    return float(np.mean(samples))


def features_of(numbers: torch.Tensor, seed: int) -> torch.Tensor:
    """Random features, the same where a view has drawn a region again."""
    x = torch.randn(*numbers.shape, 10, generator=torch.Generator().manual_seed(seed))
    first = (numbers[..., None] == numbers[..., None, :]).int().argmax(-1)
    return x.gather(2, first[..., None].expand_as(x))


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_region_info_nce__equals_numpy(temperature: float) -> None:
    queries, keys = features_of(NUMBERS, 0), features_of(NUMBERS, 1)
    found = region_info_nce(queries, keys, NUMBERS, temperature)
    assert found.item() == pytest.approx(plain_regions(queries, keys, NUMBERS, temperature), rel=1e-5)


def test_region_info_nce__own_image__is_the_mean_over_images_alone() -> None:
    queries, keys = features_of(NUMBERS, 0), features_of(NUMBERS, 1)
    found = region_info_nce(queries, keys, NUMBERS, 0.1, own_image=True)
    alone = [plain_regions(queries[b, None], keys[b, None], NUMBERS[b, None], 0.1) for b in range(len(NUMBERS))]
    assert found.item() == pytest.approx(np.mean(alone), rel=1e-5)
    assert found.item() < region_info_nce(queries, keys, NUMBERS, 0.1).item()  # fewer to be told from


def test_region_info_nce__is_smallest_where_every_region_finds_itself() -> None:
    numbers = torch.tensor([[[4, 5, 6]] * 2, [[4, 8, 9]] * 2])
    keys = torch.eye(6).view(2, 1, 3, 6).expand(2, 2, 3, 6)
    own = region_info_nce(keys, keys, numbers, 0.1).item()
    assert own == pytest.approx(np.log(1 + 10 * np.exp(-10)), rel=1e-4)  # 2 views x 5 other regions
    for order in itertools.permutations(range(3)):
        other = region_info_nce(keys[:, :, list(order)], keys, numbers, 0.1).item()
        assert order == (0, 1, 2) or other > own + 3
    same = torch.ones_like(keys)  # collapse: nothing is told from anything
    assert region_info_nce(same, same, numbers, 0.1).item() == pytest.approx(np.log(11), rel=1e-5)


def test_region_info_nce__names_of_regions_and_their_order_change_nothing() -> None:
    queries, keys = features_of(NUMBERS, 0), features_of(NUMBERS, 1)
    found = region_info_nce(queries, keys, NUMBERS, 0.1)
    renamed = torch.where(NUMBERS > 0, (NUMBERS * 7919) % 97 + 2**40, 0)
    assert torch.equal(region_info_nce(queries, keys, renamed, 0.1), found)
    order = torch.tensor([2, 0, 1])
    moved = [x[:, :, order] for x in (queries, keys, NUMBERS)]
    torch.testing.assert_close(region_info_nce(*moved, 0.1), found)


def test_region_info_nce__drawing_a_region_again_changes_nothing() -> None:
    queries, keys = features_of(NUMBERS, 0), features_of(NUMBERS, 1)
    again = [torch.cat([x, x[:, :, 1:2], x[:, :, 1:2]], 2) for x in (queries, keys, NUMBERS)]
    torch.testing.assert_close(region_info_nce(*again, 0.1), region_info_nce(queries, keys, NUMBERS, 0.1))


def test_region_info_nce__the_same_region_of_the_own_view_is_no_negative() -> None:
    numbers = torch.tensor([[[3, 3], [3, 3]]])
    queries = features_of(numbers, 0).requires_grad_()
    loss = region_info_nce(queries, features_of(numbers, 1), numbers, 0.1)
    assert loss.item() == 0  # there is nothing else to be told from
    loss.backward()
    assert queries.grad is not None and not queries.grad.any()
    other = torch.tensor([[[3, 4], [3, 4]]])
    assert region_info_nce(features_of(other, 0), features_of(other, 1), other, 0.1) > 0


def test_region_info_nce__gradient_flows_to_queries_alone_and_is_finite_without_regions() -> None:
    queries, keys = features_of(NUMBERS, 0).requires_grad_(), features_of(NUMBERS, 1).requires_grad_()
    region_info_nce(queries, keys, NUMBERS, 0.1).backward()
    assert keys.grad is None and queries.grad is not None and queries.grad.isfinite().all()
    assert queries.grad[0].abs().sum(-1).gt(0).tolist() == [[True, True, False], [True, True, False]]
    assert not queries.grad[2].any()
    nothing = region_info_nce(queries, keys, 0 * NUMBERS, 0.1)
    assert nothing.item() == 0
    queries.grad = None
    nothing.backward()
    assert queries.grad is not None and not queries.grad.any()
