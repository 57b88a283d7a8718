"""Figures that tell a living representation from a collapsed one (docs/method.md (c)); pure functions of tensors.

``Q`` samples, ``K`` prototypes, ``E`` features. Inputs may have any floating dtype and any gradient state; everything
is computed in fp32 without gradient, and nothing waits for the device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Relative size under which the spread of features is rounding noise of fp32, not structure.
_NO_SPREAD = 1e-5


@torch.no_grad()
def normalised_entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy of each distribution as a share of ln K.

    Args:
        probabilities: (..., K), non-negative, summing to 1 over the last axis; K at least 2.

    Returns:
        (...) fp32 in [0, 1]: 0 for a single prototype, 1 for the uniform distribution.
    """
    probabilities = probabilities.detach().float()
    entropy: Tensor = torch.special.entr(probabilities).sum(-1)
    return entropy / math.log(probabilities.shape[-1])


@torch.no_grad()
def kl_divergence(teacher: Tensor, student_logits: Tensor) -> Tensor:
    """Return KL(teacher || student) of each sample in nats.

    Args:
        teacher: (Q, K) probabilities.
        student_logits: (Q, K), already divided by the temperature.

    Returns:
        (Q,) fp32, at least 0.
    """
    teacher, log_student = teacher.detach().float(), F.log_softmax(student_logits.detach().float(), -1)
    return (torch.xlogy(teacher, teacher) - teacher * log_student).sum(-1)


@torch.no_grad()
def distribution_sums(teacher: Tensor, student_logits: Tensor) -> Tensor:
    """Return what :func:`distribution_figures` needs, as one vector that adds over samples, steps and ranks.

    Args:
        teacher: (Q, K) probabilities; Q may be 0.
        student_logits: (Q, K), already divided by the temperature.

    Returns:
        (3 + 2K,) fp32: number of samples, sum of entropies in nats, sum of KL in nats, sum of the probabilities (K),
        and how often each prototype is the largest of a sample (K).
    """
    teacher = teacher.detach().float()
    num_samples, num_prototypes = teacher.shape
    heads = torch.stack(
        [
            teacher.new_full((), float(num_samples)),
            torch.special.entr(teacher).sum(),
            kl_divergence(teacher, student_logits).sum(),
        ]
    )
    # not bincount: it would wait for the device
    largest = teacher.new_zeros(num_prototypes).scatter_add_(0, teacher.argmax(-1), teacher.new_ones(num_samples))
    return torch.cat([heads, teacher.sum(0), largest])


@torch.no_grad()
def distribution_figures(sums: Tensor) -> dict[str, Tensor]:
    """Return the figures of one distillation term from its summed :func:`distribution_sums`.

    Args:
        sums: (3 + 2K,); over no sample every figure but ``samples`` is NaN or 0.

    Returns:
        Scalars, fp32. ``samples``: Q. ``entropy_sample`` and ``entropy_batch``: entropy of a sample, and of the mean
        over samples, as a share of ln K (with Q samples the latter cannot exceed ln Q / ln K once samples are
        one-hot). ``information``: their difference, the mutual information of sample and prototype. ``kl``:
        KL(teacher || student) in nats. ``cross_entropy``: kl plus the teacher's entropy, in nats; ln K when both are
        uniform. ``max_share``: share of samples whose largest prototype is the commonest one. ``active``: number of
        prototypes that are the largest of any sample.
    """
    num_prototypes = (sums.numel() - 3) // 2
    mean = sums / sums[0]
    batch = normalised_entropy(mean[3 : 3 + num_prototypes])
    sample = mean[1] / math.log(num_prototypes)
    largest = sums[3 + num_prototypes :]
    return {
        "samples": sums[0],
        "entropy_sample": sample,
        "entropy_batch": batch,
        "information": batch - sample,
        "kl": mean[2],
        "cross_entropy": mean[1] + mean[2],
        "max_share": largest.max() / sums[0],
        "active": (largest > 0).sum().float(),
    }


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Return the mean over features of the std of L2-normalised rows, times sqrt(E).

    Args:
        features: (Q, E).

    Returns:
        () fp32: 1 for isotropic features, 0 when all rows point the same way.
    """
    unit = F.normalize(features.detach().float(), dim=-1, eps=1e-6)
    return unit.std(0, correction=0).mean() * math.sqrt(features.shape[-1])


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """Return exp of the entropy of the normalised singular values of the centred rows.

    Source: Roy & Vetterli, "The effective rank", EUSIPCO 2007.

    Args:
        features: (Q, E).

    Returns:
        () fp32 in [1, min(Q - 1, E)]; 1 when the rows are equal up to rounding, NaN when one is not finite.
    """
    features = features.detach().float()
    finite = features.isfinite().all()
    features = torch.where(finite, features, torch.zeros_like(features))  # svdvals raises at NaN
    centred = features - features.mean(0)
    values = torch.linalg.svdvals(centred)
    share = values / values.sum().clamp_min(torch.finfo(torch.float32).tiny)
    rank = torch.special.entr(share).sum().exp()
    flat = torch.linalg.vector_norm(centred) <= _NO_SPREAD * torch.linalg.vector_norm(features)
    return torch.where(finite, torch.where(flat, torch.ones_like(rank), rank), torch.full_like(rank, torch.nan))


@torch.no_grad()
def rankme(features: Tensor) -> Tensor:
    """Return RankMe, exp of the entropy of the normalised singular values of the rows as they are, not centred.

    Source: Garrido et al. 2023, arXiv:2210.02885, eq. 1. Deviates: singular values from the Gram matrix in float64, so
    that a million tokens cost one product; those below 1e-7 of the largest may be rounding.

    Args:
        features: (Q, E).

    Returns:
        () fp32 in [1, min(Q, E)].
    """
    rows = features.detach().double()
    gram = rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
    rank: Tensor = torch.special.entr(share + 1e-7).sum().exp().float()
    return rank


@torch.no_grad()
def off_diagonal_cosine(features: Tensor) -> Tensor:
    """Return the mean cosine between two different rows of ``features`` (Q, E), Q at least 2; () fp32."""
    unit = F.normalize(features.detach().float(), dim=-1, eps=1e-6)
    num_rows = unit.shape[0]
    return (unit.sum(0).square().sum() - unit.square().sum()) / (num_rows * (num_rows - 1))


@torch.no_grad()
def norm_outlier(features: Tensor) -> Tensor:
    """Return the largest row norm divided by the median one: high when a few tokens act as registers.

    Args:
        features: (Q, E).

    Returns:
        () fp32, at least 1.
    """
    norms: Tensor = torch.linalg.vector_norm(features.detach().float(), dim=-1)
    return norms.max() / norms.median().clamp_min(1e-6)


@torch.no_grad()
def attention_figures(attention: Tensor) -> dict[str, Tensor]:
    """Return how spread and how alike the attention maps of [CLS] are.

    Args:
        attention: (heads, ...) non-negative weights over tokens; each head is brought to sum 1.

    Returns:
        Scalars, fp32. ``attention_entropy``: mean over heads of the entropy as a share of ln N.
        ``attention_correlation``: mean correlation between two different heads (0 with one head).
    """
    maps = attention.detach().float().flatten(1)
    maps = maps / maps.sum(-1, keepdim=True).clamp_min(1e-12)
    heads = maps.shape[0]
    centred = F.normalize(maps - maps.mean(-1, keepdim=True), dim=-1, eps=1e-12)
    correlation = (centred.sum(0).square().sum() - centred.square().sum()) / max(heads * (heads - 1), 1)
    return {"attention_entropy": normalised_entropy(maps).mean(), "attention_correlation": correlation}


@torch.no_grad()
def min_distance(features: Tensor) -> Tensor:
    """Return the smallest distance between two different L2-normalised rows of ``features`` (Q, E); () fp32."""
    unit = F.normalize(features.detach().float(), dim=-1, eps=1e-6)
    return torch.pdist(unit).min()
