"""Optimal transport between the tokens of two views, with a dustbin for tokens that have no counterpart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class DustbinTransport(nn.Module):
    """Share out each token of one view among the tokens of another and a dustbin, and the other way round.

    Scores are cosines over a temperature; a row and a column for the dustbin are appended, at one score for all. Of M
    rows and N columns each token has mass 1, the dustbin's row N and its column M. Sinkhorn's iterations run in the log
    domain and in fp32, whatever the range of the scores and the precision outside.

    Source: Cuturi, NeurIPS 2013, arXiv 1306.0895 [R: Cuturi]; dustbin and marginals of SuperGlue, arXiv 1911.11763, as
    S2DC takes them [R: SuperGlue].
    Deviates: the dustbin's score is a cosine too, divided by the temperature like the others, and by default a
    parameter that starts at 0; S2DC's released code has scores over 1 and 1.0 for the dustbin, which no optimiser sees
    (``temperature=1, dustbin=1, learn_dustbin=False``), and with it no features put more than 0.0071 on the right one
    of 144 pairs. The gradient is that of the fixed point (ours, see :func:`log_sinkhorn`).

    Args:
        temperature: that cosines are divided by.
        dustbin: score of the dustbin, a cosine; where it starts if it is learned.
        learn_dustbin: register it as a parameter; otherwise it is a constant of the module.
        iterations: pairs of normalisations.

    Raises:
        ValueError: if the temperature is not above 0, or there is no iteration.
    """

    dustbin: Tensor

    def __init__(
        self, temperature: float = 0.1, dustbin: float = 0.0, learn_dustbin: bool = True, iterations: int = 100
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"transport temperature is {temperature}; give a number above 0, 0.1 say")
        if iterations < 1:
            raise ValueError(f"transport iterations is {iterations}; give at least 1, 100 say")
        self.temperature = temperature
        self.iterations = iterations
        if learn_dustbin:
            self.dustbin = nn.Parameter(torch.tensor([dustbin]))  # (1,): FSDP2 takes no scalars
        else:
            self.register_buffer("dustbin", torch.tensor([dustbin]))

    def forward(self, cosines: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        """Return the logarithm of the plan, (B, M + 1, N + 1) float32, the dustbin last.

        Args:
            cosines: (B, M, N) float32.
            rows: (B, M) bool, tokens that take part; None lets all. The others have no mass, -inf in the result, and
                the plan of the rest is that without them.
            columns: (B, N) bool, likewise.
        """
        with torch.autocast(cosines.device.type, enabled=False):
            batch, m, n = cosines.shape
            scores = cosines.float() / self.temperature
            dustbin = self.dustbin.float() / self.temperature
            scores = torch.cat([scores, dustbin.expand(batch, m, 1)], 2)
            scores = torch.cat([scores, dustbin.expand(batch, 1, n + 1)], 1)
            mass_rows = scores.new_ones(batch, m) if rows is None else rows.float()
            mass_columns = scores.new_ones(batch, n) if columns is None else columns.float()
            rest_rows, rest_columns = mass_columns.sum(1, keepdim=True), mass_rows.sum(1, keepdim=True)
            mass_rows = torch.cat([mass_rows, rest_rows], 1)
            mass_columns = torch.cat([mass_columns, rest_columns], 1)
            return log_sinkhorn(scores, mass_rows, mass_columns, self.iterations)


def log_sinkhorn(scores: Tensor, mass_rows: Tensor, mass_columns: Tensor, iterations: int) -> Tensor:
    """Return ``log P`` with P of the form ``diag exp(scores) diag`` and the given sums of rows and columns.

    The last step sets the columns, so these are exact and the rows as exact as the iterations make them. Memory and
    gradient do not hang on their number: the gradient is that of the fixed point, found by as many iterations of the
    linear equations that tie the two scalings together. It equals that through all iterations once they have converged.

    Source: Sinkhorn's iterations in logs; the fixed point's gradient by the implicit function theorem, Luise et al.,
    NeurIPS 2018, arXiv 1805.11897 [R].

    Args:
        scores: (B, R, C) float32, finite.
        mass_rows: (B, R) float32; rows without mass are -inf in the result and take no part.
        mass_columns: (B, C) float32, of the same sum.
        iterations: pairs of normalisations.
    """
    plan: Tensor = _LogSinkhorn.apply(scores, mass_rows, mass_columns, iterations)  # type: ignore[no-untyped-call]  # torch
    return plan


class _LogSinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, mass_rows: Tensor, mass_columns: Tensor, iterations: int) -> Tensor:
        log_rows, log_columns = mass_rows[:, :, None].log(), mass_columns[:, None].log()
        empty_rows, empty_columns = log_rows.isneginf(), log_columns.isneginf()
        scores = scores.masked_fill(empty_rows | empty_columns, -torch.inf)
        column = torch.zeros_like(log_columns)
        for _ in range(iterations):  # empty ones would be -inf + inf
            row = (log_rows - (scores + column).logsumexp(2, keepdim=True)).masked_fill_(empty_rows, 0)  # (B, R, 1)
            column = (log_columns - (scores + row).logsumexp(1, keepdim=True)).masked_fill_(empty_columns, 0)
        log_plan = scores + row + column
        ctx.save_for_backward(log_plan, mass_rows, mass_columns)
        ctx.iterations = iterations
        return log_plan

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        log_plan, mass_rows, mass_columns = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            plan = log_plan.exp()
            # Sums of rows and columns stay: a_i x_i + sum_j P_ij y_j = sum_j G_ij, and the same for columns.
            grad = grad.masked_fill(log_plan.isneginf(), 0)
            sum_rows, sum_columns = grad.sum(2, keepdim=True), grad.sum(1, keepdim=True).mT  # (B, R, 1), (B, C, 1)
            a, b = (mass[..., None].clamp_min(1e-30) for mass in (mass_rows, mass_columns))
            x, y = torch.zeros_like(sum_rows), torch.zeros_like(sum_columns)
            for _ in range(ctx.iterations):
                y = (sum_columns - plan.mT @ x) / b
                x = (sum_rows - plan @ y) / a
            y = (sum_columns - plan.mT @ x) / b
            return grad - plan * (x + y.mT), None, None, None
