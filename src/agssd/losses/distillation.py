"""Self-distillation: cross-entropy between teacher and student prototypes, centring and Sinkhorn targets.

Everything runs in fp32: heads return fp32 logits whatever surrounds them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from agssd.distributed import all_max, all_sum
from agssd.types import Observations


def refuse_temperatures(**given: float | tuple[float, float]) -> None:
    """Refuse temperatures, or ranges of them, that logits cannot be divided by.

    Args:
        given: by the name of the setting.

    Raises:
        ValueError: if one is not above 0.
    """
    for name, value in given.items():
        if min(value if isinstance(value, (tuple, list)) else (value,)) <= 0:
            raise ValueError(f"{name} is {value}; a temperature lies above 0, 0.1 say")


def cross_entropy(targets: Tensor, logits: Tensor) -> Tensor:
    """Return (...,): ``-sum_k p_k log softmax(logits)_k``.

    Source: DINO, eq. 2 [R: DINO].

    Args:
        targets: (..., K) float32 teacher probabilities.
        logits: (..., K) float32 student logits, already divided by the student's temperature.
    """
    return logits.logsumexp(-1) - (targets * logits).sum(-1)


def masked_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return the mean over samples of each sample's weighted mean; a sample without weight counts as 0.

    Samples, not tokens, are the unit, so the result does not depend on how the batch is cut.

    Args:
        values: (B, M) float32.
        weights: (B, M) float32 or bool.
    """
    weights = weights.to(values.dtype)
    return ((values * weights).sum(1) / weights.sum(1).clamp_min(1e-6)).mean()


def multi_crop_cross_entropy(
    targets: Tensor, global_logits: Tensor, local_logits: Tensor | None = None, seen: Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy over all pairs of a teacher's global view and a student's other view.

    Every sample has equally many pairs, so the result does not depend on how the batch is cut.

    Source: DINO, eq. 3 [R: DINO].

    Args:
        targets: (B, 2, K) float32 teacher probabilities of the global views.
        global_logits: (B, 2, K) float32 student logits of the same views, divided by the student's temperature; or
            (B, 1, K) where the student sees one of them only.
        local_logits: (B, L, K) of the local views, or None.
        seen: (B,) int64, which view that one is; None where the student sees both.
    """
    if seen is None:
        pairs = [cross_entropy(targets, global_logits.flip(1))]  # (B, 2)
    else:
        other = targets[torch.arange(len(seen), device=seen.device), 1 - seen]
        pairs = [cross_entropy(other[:, None], global_logits)]  # (B, 1)
    if local_logits is not None:
        pairs.append(cross_entropy(targets[:, :, None], local_logits[:, None]).flatten(1))
    return torch.cat(pairs, 1).mean()


@dataclass(frozen=True)
class PatchDistillation:
    """What a step with a [CLS] and a patch term leaves for monitors; all detached."""

    counts: Tensor  # (B, M) bool: the hidden tokens that hold body
    teacher_cls: Tensor  # (B, 2, K) probabilities
    student_cls: Tensor  # (B, 2, K) logits over the temperature
    teacher_patch: Tensor  # (B, M, K) probabilities
    student_patch: Tensor  # (B, M, K) logits over the temperature
    cls: Tensor  # (B, 2, E) teacher
    tokens: Tensor  # (B, M, E) teacher

    def observations(self, scalars: dict[str, Tensor]) -> Observations:
        """Return the rows that count, teacher and student paired as in the loss; selecting them waits for the host."""
        return {
            "teacher_cls": self.teacher_cls.flatten(0, 1),
            "student_cls": self.student_cls.flip(1).flatten(0, 1),
            "teacher_patch": self.teacher_patch[self.counts],
            "student_patch": self.student_patch[self.counts],
            "cls_features": self.cls.flatten(0, 1).float(),
            "patch_features": self.tokens[self.counts].float(),
            "scalars": scalars,
        }


class Centre(nn.Module):
    """What is subtracted from the teacher's logits before its softmax, moved once per optimiser step.

    ``targets`` collects sums; ``update`` moves the centre from all samples of all micro-batches and ranks, so
    accumulation 4x1 equals 1x4 and two ranks equal one. Two rules:

    - ``"mean"``: running mean of the logits. Source: DINO §3.1 [R: DINO].
    - ``"balance"``: the centre of a prototype rises by ``temperature * log(momentum + (1 - momentum) K p)``, with ``p``
      its mean probability in this step, so that over many steps every prototype gets the same share. It is Sinkhorn's
      column scaling carried from step to step: balanced like Sinkhorn without needing many samples at once. Source:
      ours, for small batches, where the mean of logits lets few prototypes take all samples and Sinkhorn of a few
      dozen samples stays near uniform.

    Args:
        num_prototypes: K.
        momentum: share of the old centre that is kept per optimiser step.
        rule: ``"mean"`` or ``"balance"``.
    """

    centre: Tensor

    def __init__(self, num_prototypes: int, momentum: float = 0.9, rule: Literal["mean", "balance"] = "mean") -> None:
        super().__init__()
        self.momentum = momentum
        self.rule = rule
        self.register_buffer("centre", torch.zeros(num_prototypes))
        # Not a buffer: DDP would overwrite the other ranks' sums with those of rank 0 at every micro-batch.
        self._observed: Tensor | None = None  # (K + 1,): sum of logits or probabilities, then their weight
        self._temperature = 1.0

    @torch.no_grad()
    def targets(
        self, logits: Tensor, temperature: float, weights: Tensor | None = None, observe: bool = False
    ) -> Tensor:
        """Return teacher probabilities (..., K): ``softmax((logits - centre) / temperature)``.

        Args:
            logits: (..., K).
            temperature: of the teacher.
            weights: (...) weight of each row in the centre; None counts all.
            observe: whether the next ``update`` takes these rows into account.
        """
        logits = logits.float()
        targets = ((logits - self.centre) / temperature).softmax(-1)
        if observe:
            flat = (logits if self.rule == "mean" else targets).flatten(0, -2)
            weight = flat.new_ones(flat.shape[0]) if weights is None else weights.flatten().float()
            seen = torch.cat([(weight[:, None] * flat).sum(0), weight.sum()[None]])  # no matmul: autocast would round
            self._observed = seen if self._observed is None else self._observed + seen
            self._temperature = temperature
        return targets

    @torch.no_grad()
    def update(self, strength: float = 1.0) -> None:
        """Move the centre by all rows observed since the last call, over all ranks; stay if there were none.

        Args:
            strength: factor of ``1 - momentum``, in [0, 1].
        """
        rate = (1 - self.momentum) * strength
        observed = self._observed if self._observed is not None else self.centre.new_zeros(len(self.centre) + 1)
        total = all_sum(observed)
        mean = total[:-1] / total[-1].clamp_min(1e-6)
        if self.rule == "mean":
            moved = torch.lerp(self.centre, mean, rate)
        else:
            load = 1 - rate + rate * len(self.centre) * mean
            moved = self.centre + self._temperature * load.clamp_min(1e-6).log()
            moved = moved - moved.mean()  # softmax does not see a common shift; without this it would grow
        self.centre.copy_(torch.where(total[-1] > 0, moved, self.centre))
        self._observed = None


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, weights: Tensor | None = None, iterations: int = 3) -> Tensor:
    """Return balanced teacher probabilities, in the log domain, over all ranks.

    Columns (prototypes) are brought to equal mass and rows to sum 1 in turn; the last step normalises rows. Rows of
    weight 0 take no part. Counts are all-reduced sums of weights. Working in logs needs no maximum to be subtracted,
    so it equals the exact result and does not overflow at small temperatures (docs/method.md (b) 3).

    Accumulation changes the result: it balances over one micro-batch of all ranks, not over the optimiser step.

    Source: SwAV, DINOv2 [R: DINOv2]; log domain and weights ours.

    Args:
        logits: (..., K) float32.
        temperature: of the teacher.
        weights: (...) 1 for rows that count, 0 for padding; None counts all.
        iterations: pairs of normalisations.

    Returns:
        (..., K) float32; rows of weight 1 sum to 1, others are 0.
    """
    shape = logits.shape
    x = logits.float().flatten(0, -2) / temperature
    used = torch.ones(x.shape[0], device=x.device) if weights is None else weights.flatten().float()
    x = x.masked_fill(used[:, None] == 0, -torch.inf)
    count = all_sum(used.sum()).clamp_min(1)
    for _ in range(iterations):
        top = all_max(x.amax(0)) if x.shape[0] else all_max(x.new_full((x.shape[1],), -torch.inf))
        top = torch.where(top.isfinite(), top, torch.zeros_like(top))
        column = top + all_sum((x - top).exp().sum(0)).clamp_min(1e-30).log()
        x = x - column - math.log(x.shape[1])
        row = x.logsumexp(1, keepdim=True)
        x = x - torch.where(row.isfinite(), row, torch.zeros_like(row)) - count.log()
    return (x + count.log()).exp().reshape(shape)
