"""InfoNCE against plain NumPy, and against what half precision and small batches do to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agssd.losses.info_nce import KeyQueue, first_among_all, info_nce


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
