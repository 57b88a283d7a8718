"""InfoNCE: each query finds its own key among those of other samples, of the micro-batch or of earlier steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agssd.distributed import gather_rows, rank
from agssd.losses.distillation import masked_mean

_NEVER = -1e4  # a logit that counts for nothing, and whose gradient is 0


def info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy of each query's own key among the keys of the micro-batch of all ranks.

    Scaled by ``2 * temperature``, so that the size of the gradient does not hang on the temperature. Accumulation
    changes the result: negatives come from one micro-batch. A batch of one sample has none, and the loss is 0.

    Source: van den Oord et al., arXiv 1807.03748; MoCo v3, algorithm 1 [R: MoCo v3].

    Args:
        queries: (B, E), row i belongs to row i of ``keys``.
        keys: (B, E) of the teacher; no gradient flows to them.
        temperature: of the softmax.
    """
    with torch.autocast(queries.device.type, enabled=False):
        found = F.normalize(queries.float(), dim=-1, eps=1e-6)
        offered = F.normalize(gather_rows(keys.detach().float()), dim=-1, eps=1e-6)
        own = torch.arange(len(found), device=found.device) + rank() * len(found)
        return 2 * temperature * F.cross_entropy(found @ offered.T / temperature, own)


def region_info_nce(
    queries: Tensor, keys: Tensor, numbers: Tensor, temperature: float, own_image: bool = False
) -> Tensor:
    """Return how well each region of a view finds itself in the other view of its image; a mean over samples.

    Every query is told to find the key of the same region in the other view among the keys of all other regions, of
    both views and of all images of the micro-batch of all ranks. Keys of the same region of the same image, in the own
    view or drawn more than once, are no negatives. Queries and negatives that were drawn m times count 1/m each, so
    that drawing a region again changes nothing. Regions of a sample count alike, and then samples; one without regions
    counts 0. Accumulation changes the result: negatives come from one micro-batch.

    Source: Hénaff et al., ICCV 2021, arXiv 2103.10957 [R: DetCon], whose form ANAUS has, arXiv 2605.25402.
    Deviates: negatives that were drawn repeatedly count once (ours; there they count as often as they were drawn).

    Args:
        queries: (B, 2, K, E) of the student, of K regions of both views.
        keys: (B, 2, K, E) of the teacher; no gradient flows to them.
        numbers: (B, 2, K) int64, of which region each row is; 0 for none.
        temperature: of the softmax.
        own_image: negatives come from the query's own image alone, so that nothing depends on the batch (ours).
    """
    with torch.autocast(queries.device.type, enabled=False):
        found = F.normalize(queries.float(), dim=-1, eps=1e-6)
        offered = F.normalize(gather_rows(keys.detach().float()), dim=-1, eps=1e-6)
        batch, _, count = numbers.shape
        times = (numbers[..., None] == numbers[..., None, :]).sum(-1)  # (B, 2, K): how often each was drawn
        weight = (numbers > 0) / times
        all_numbers, all_weights = gather_rows(numbers), gather_rows(weight)
        cosines = (found.flatten(0, 2) @ offered.flatten(0, 2).T).view(batch, 2, count, -1, 2, count)
        logits = cosines / temperature

        image = torch.arange(batch, device=numbers.device) + rank() * batch
        own = image[:, None] == torch.arange(len(all_numbers), device=numbers.device)  # (B, ranks * B)
        same = own[:, None, None, :, None, None] & (numbers[:, :, :, None, None, None] == all_numbers)
        other_view = ~torch.eye(2, dtype=torch.bool, device=numbers.device)
        positive = same & other_view[:, None, None, :, None] & (all_weights > 0)
        negative = ~same & (all_weights > 0)
        if own_image:
            negative = negative & own[:, None, None, :, None, None]
        known = positive.sum((-3, -2, -1))  # (B, 2, K)
        wanted = (logits * positive).sum((-3, -2, -1)) / known.clamp_min(1)
        others = (logits + all_weights.clamp_min(1e-6).log()).masked_fill(~negative, _NEVER)
        loss = F.softplus(others.flatten(3).logsumexp(-1) - wanted)
        weight = weight * (known > 0)
        return masked_mean(loss.flatten(1), weight.flatten(1))


def first_among_all(cosines: Tensor, temperature: float) -> Tensor:
    """Return (...,): the cross-entropy of the first of (..., 1 + n) cosines, that of the own key, among all."""
    logits = cosines / temperature
    return logits.logsumexp(-1) - logits[..., 0]


class KeyQueue(nn.Module):
    """Keys of earlier steps as negatives, moved once per optimiser step; stored with the checkpoint.

    No negative comes from the micro-batch itself, so the result does not depend on how the batch is cut: ``observe``
    collects keys, and ``update`` puts those of all micro-batches and ranks in, in the order of samples, over the oldest
    ones. Until it is full, random directions take the place of keys that are not there yet.

    Queries and keys are compared by their directions from the running mean of keys, of each key's own time; all have
    length 1 before and after. What all samples share would otherwise drift away from the queue's older keys for ever,
    which lowers the loss and tells no sample from another.

    Source: He et al., CVPR 2020, arXiv 1911.05722 [R: MoCo]; per optimiser step, in the order of samples and from the
    mean, which there is left to batch norm: ours.

    Args:
        size: number of keys.
        width: E.
        momentum: share of the old mean that is kept per optimiser step.
        seed: of the random directions.

    Raises:
        ValueError: if ``size`` is below 1.
    """

    keys: Tensor
    mean: Tensor
    seen: Tensor
    updates: Tensor

    def __init__(self, size: int, width: int, momentum: float = 0.9, seed: int = 0) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"queue_size is {size}; give at least 1 key, 90 per sample of a step, say")
        self.momentum = momentum
        random = torch.randn(size, width, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("keys", F.normalize(random, dim=-1))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # keys put in since the start
        self.register_buffer("updates", torch.zeros(()))
        # No buffers: DDP would overwrite the other ranks' keys with those of rank 0 at every micro-batch.
        self._waiting: list[tuple[Tensor, Tensor]] = []

    @property
    def fill(self) -> Tensor:
        """(): share of the queue that holds keys of samples."""
        return (self.seen / len(self.keys)).clamp_max(1)

    def _from_mean(self, x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=-1, eps=1e-6) - self.mean

    def cosines(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return (..., 1 + size) float32: how alike each query is to its own key, first, and to those of the queue.

        Args:
            queries: (..., E).
            keys: (..., E) of the teacher, row by row; no gradient flows to them.
        """
        with torch.autocast(queries.device.type, enabled=False):
            found, own, others = (
                F.normalize(x, dim=-1, eps=1e-6)
                for x in (self._from_mean(queries), self._from_mean(keys.detach()), self.keys)
            )
            return torch.cat([(found * own).sum(-1, keepdim=True), found @ others.T], -1)

    @torch.no_grad()
    def observe(self, keys: Tensor, sample: Tensor) -> None:
        """Keep keys for the next :meth:`update`.

        Args:
            keys: (B, E), one per sample.
            sample: (B,) int64.
        """
        self._waiting.append((keys.float(), sample))

    @torch.no_grad()
    def update(self) -> None:
        """Put in the keys observed since the last call, of all ranks; all ranks must have observed equally many."""
        if not self._waiting:
            return
        rows, sample = (gather_rows(torch.cat(parts)) for parts in zip(*self._waiting, strict=True))
        self._waiting = []
        size = len(self.keys)
        rows = F.normalize(rows[sample.argsort()], dim=-1, eps=1e-6)
        last = self._from_mean(rows)[-size:]  # of more keys than there is room for
        self.keys[(self.seen + torch.arange(len(last), device=last.device)) % size] = last
        self.seen += len(last)
        kept = torch.clamp(self.updates / (self.updates + 1), max=self.momentum)
        self.mean.copy_(torch.lerp(rows.mean(0), self.mean, kept))
        self.updates += 1
