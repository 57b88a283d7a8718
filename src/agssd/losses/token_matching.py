"""S2DC's losses between the tokens of two views whose counterparts are known."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_SMALL = 1e-6


class TokenPairs(NamedTuple):
    """Which token of a view (rows) is which of another (columns): one to one, and not for all."""

    partner: Tensor  # (B, M) int64, the column of each row's counterpart where it has one
    paired: Tensor  # (B, M) bool, rows that have one; both take part
    rows: Tensor  # (B, M) bool, rows that take part
    columns: Tensor  # (B, N) bool, columns that take part
    lost_rows: Tensor  # (B, M) bool, rows that take part and lie outside the other view
    lost_columns: Tensor  # (B, N) bool, likewise

    @property
    def matrix(self) -> Tensor:
        """Y: (B, M, N) bool, True for a row and its counterpart."""
        empty = torch.zeros(*self.rows.shape, self.columns.shape[1], dtype=torch.bool, device=self.rows.device)
        return empty.scatter(2, self.partner[..., None], self.paired[..., None])

    @property
    def others(self) -> Tensor:
        """(B, M, N) bool: all that take part, but for the pairs."""
        return self.rows[:, :, None] & self.columns[:, None] & ~self.matrix

    def of_partner(self, matrix: Tensor) -> Tensor:
        """Return (B, M): the entry of (B, M, N) at each row's counterpart."""
        return matrix.gather(2, self.partner[..., None])[..., 0]


def mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    """Return (B,): mean of each sample's chosen values, 0 where none is chosen; what is left out may be infinite.

    Args:
        values: (B, ...) float32.
        chosen: (B, ...) bool.
    """
    kept = torch.where(chosen, values, torch.zeros_like(values)).flatten(1).sum(1)
    return kept / chosen.flatten(1).sum(1).clamp_min(1)


def discrepancy(log_plan: Tensor, pairs: TokenPairs) -> Tensor:
    """Return (B,): how far a transport plan is from the pairs; three means of each sample, added.

    ``-log P`` of the pairs, ``-log(1 - P)`` of all others, and ``-log P`` of the dustbin for tokens that lie outside
    the other view. Tokens inside it whose place belongs to a pair of others (the finer of two grids has more tokens)
    are told nothing but not to match.

    Source: S2DC, arXiv 2507.02581 [R: S2DC, released code] for the first two; the third [R: SuperGlue], whose pairs see
    different parts of a scene as ours do.

    Args:
        log_plan: (B, M + 1, N + 1) float32, the dustbin last.
        pairs: the truth.
    """
    inner = log_plan[:, :-1, :-1]
    matched = mean_where(-pairs.of_partner(inner), pairs.paired)
    against = mean_where(-torch.log(-torch.expm1(inner.clamp_max(-_SMALL))), pairs.others)
    dustbin = torch.cat([log_plan[:, :-1, -1], log_plan[:, -1, :-1]], 1)
    lost = mean_where(-dustbin, torch.cat([pairs.lost_rows, pairs.lost_columns], 1))
    return matched + against + lost


def consistency(cosines: Tensor, pairs: TokenPairs) -> Tensor:
    """Return (B,): pairs are alike, the sharpest tokens first, and others are not.

    With ``S' = (1 + cos) / 2``: half the sum over pairs of ``(c_j + r_i) (-log S'_ij)``, plus the mean of
    ``-log(1 - S'_ij)`` over the others. A token is sharp if one similarity of it stands out,
    ``(max - mean) / deviation``; c and r are the softmax of that over columns and over rows.

    Source: S2DC [R: S2DC, released code].
    Deviates: weights are shared out among tokens that have a counterpart, so that they sum to 1 however few there are;
    they are constants of the step, since the deviation of equal similarities has no gradient (both ours).

    Args:
        cosines: (B, M, N) float32.
        pairs: the truth.
    """
    similar = ((1 + cosines) / 2).clamp(_SMALL, 1 - _SMALL)
    takes_part = pairs.rows[:, :, None] & pairs.columns[:, None]
    with torch.no_grad():
        has_pair = pairs.matrix.any(1)
        column_weight = _shares(_sharpness(similar.mT, takes_part.mT), has_pair)
        row_weight = _shares(_sharpness(similar, takes_part), pairs.paired)
        weight = (row_weight + column_weight.gather(1, pairs.partner)) / 2
    apart = -torch.log(pairs.of_partner(similar))
    alike = torch.where(pairs.paired, weight * apart, torch.zeros_like(apart)).sum(1)
    return alike + mean_where(-torch.log1p(-similar), pairs.others)


def _sharpness(similar: Tensor, chosen: Tensor) -> Tensor:
    """Return (B, M): how far the largest of each row's chosen entries stands above their mean, in deviations."""
    count = chosen.sum(2).clamp_min(1)
    mean = (similar * chosen).sum(2) / count
    spread = (((similar - mean[..., None]).square() * chosen).sum(2) / (count - 1).clamp_min(1)).sqrt()
    return (similar.masked_fill(~chosen, 0).amax(2) - mean) / spread.clamp_min(_SMALL)


def _shares(values: Tensor, chosen: Tensor) -> Tensor:
    """Return (B, M): softmax over the chosen values, 0 elsewhere."""
    return values.masked_fill(~chosen, -torch.inf).softmax(1).masked_fill(~chosen, 0)
