"""Scores of frozen features of whole volumes: weighted k-NN and L-BFGS logistic regression."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _check(train: Tensor, targets: Tensor, query: Tensor, num_classes: int) -> None:
    if train.ndim != 2 or query.ndim != 2 or train.shape[1] != query.shape[1] or targets.shape != train.shape[:1]:
        raise ValueError(
            f"train {tuple(train.shape)}, targets {tuple(targets.shape)} and query {tuple(query.shape)} do not fit: "
            "give (N, E), (N,) and (M, E)"
        )
    if int(targets.min()) < 0 or int(targets.max()) >= num_classes:
        raise ValueError(f"targets hold {int(targets.min())} to {int(targets.max())}, num_classes is {num_classes}")


def knn_probabilities(
    train: Tensor, targets: Tensor, query: Tensor, num_classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Return the class shares among the ``k`` nearest training features by cosine similarity.

    Args:
        train: (N, E) features of labelled volumes.
        targets: (N,) int64.
        query: (M, E) features to classify.
        num_classes: number of classes K.
        k: neighbours; at most N are used.
        temperature: a neighbour of similarity s votes with exp(s / temperature).

    Returns:
        (M, K) float32, rows summing to 1.

    Raises:
        ValueError: if shapes do not fit or a target is not a class.

    Source: [R: DINO], k-NN evaluation.
    """
    _check(train, targets, query, num_classes)
    similarity = F.normalize(query.float(), dim=1) @ F.normalize(train.float(), dim=1).T
    top, neighbours = similarity.topk(min(k, len(train)), dim=1)
    votes = ((top - top[:, :1]) / temperature).exp()
    shares = torch.zeros(len(query), num_classes, device=votes.device)
    shares.scatter_add_(1, targets.to(votes.device)[neighbours], votes)
    return shares / shares.sum(1, keepdim=True)


def logistic_probabilities(
    train: Tensor, targets: Tensor, query: Tensor, num_classes: int, penalty: float = 1e-2, max_iter: int = 500
) -> Tensor:
    """Return class probabilities of multinomial logistic regression on standardised features.

    Args:
        train: (N, E) features of labelled volumes.
        targets: (N,) int64.
        query: (M, E) features to classify.
        num_classes: number of classes K.
        penalty: weight of the mean squared coefficient sum, relative to the mean cross-entropy.
        max_iter: L-BFGS iterations at most.

    Returns:
        (M, K) float32, rows summing to 1. Deterministic: starts at zero, full batch, float64.

    Raises:
        ValueError: if shapes do not fit or a target is not a class.
    """
    _check(train, targets, query, num_classes)
    mean, std = train.double().mean(0), train.double().std(0, unbiased=False).clamp_min(1e-6)
    inputs, queries = (train.double() - mean) / std, (query.double() - mean) / std
    weight = torch.zeros(num_classes, inputs.shape[1], dtype=torch.float64, device=inputs.device, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, device=inputs.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=max_iter, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(inputs, weight, bias), targets) + penalty * weight.square().sum()
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return F.linear(queries, weight.detach(), bias.detach()).softmax(1).float()
