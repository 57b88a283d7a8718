"""CVAA: cross-attention that fuses one view with another, biased by where their tokens lie."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from agssd.geometry import constant, correspondence, token_centres
from agssd.transforms.keyed_random import KeyedRandom
from agssd.types import Size

_POSITION_PITCHES = 2.0  # standard deviation of the position bias, in token pitches of the other view
_COUNTERPART_PITCHES = 1.5  # keys closer than this to a token's place are its counterpart


class CrossViewBlock(nn.Module):
    """One cross-attention block and an MLP, both residual.

    Args:
        dim: E.
        num_heads: attention heads; every head has a learned gain on the position bias, 1 at the start.
        mlp_ratio: hidden width of the MLP over E.
        layer_scale: first value of the residual gains, None for none.
        norm: ``"pre"`` (ours) or ``"post"`` (Alice's CASA) [R: Alice].
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, layer_scale: float | None, norm: Literal["pre", "post"]
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.pre = norm == "pre"
        self.norm_query = nn.LayerNorm(dim, eps=1e-6)
        self.norm_memory = nn.LayerNorm(dim, eps=1e-6) if self.pre else nn.Identity()
        self.norm_mlp = nn.LayerNorm(dim, eps=1e-6)
        self.query = nn.Linear(dim, dim)
        self.memory = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.gain = nn.Parameter(torch.ones(num_heads))
        self.scale_attention = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None
        self.scale_mlp = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def _attend(self, query: Tensor, memory: Tensor, bias: Tensor | None, forbidden: Tensor | None) -> Tensor:
        q = rearrange(self.query(query), "b n (h e) -> b h n e", h=self.num_heads)
        k, v = rearrange(self.memory(memory), "b m (two h e) -> two b h m e", two=2, h=self.num_heads)
        if bias is None:
            # The gains stay in the graph; over all keys, since attention kernels take no mask that repeats along them.
            logits = self.gain.new_zeros(1, 1, 1, k.shape[2]) * self.gain[:, None, None]
        else:
            logits = bias[:, None] * self.gain[:, None, None]  # (B, heads, N, M)
        if forbidden is not None:
            logits = logits.expand(q.shape[0], -1, q.shape[2], k.shape[2]).masked_fill(forbidden[:, None], -torch.inf)
        if q.device.type == "cpu":  # SDPA's backward with a mask is slow there
            weights = ((q * q.shape[-1] ** -0.5) @ k.mT + logits).softmax(-1)
            attended = weights.to(v.dtype) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=logits.to(q.dtype))
        out: Tensor = self.out(rearrange(attended, "b h n e -> b n (h e)"))
        return out

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor | None, forbidden: Tensor | None) -> Tensor:
        """Return x (B, N, E) after attending to memory (B, M, E); see :class:`CrossViewFuser`."""
        if self.pre:
            attended = self._attend(self.norm_query(x), self.norm_memory(memory), bias, forbidden)
            x = x + (attended if self.scale_attention is None else attended * self.scale_attention)
            mixed: Tensor = self.mlp(self.norm_mlp(x))
            return x + (mixed if self.scale_mlp is None else mixed * self.scale_mlp)
        fused: Tensor = self.norm_query(x + self._attend(x, memory, bias, forbidden))
        out: Tensor = self.norm_mlp(fused + self.mlp(fused))
        return out


class CrossViewFuser(nn.Module):
    """Fuse the tokens of view A with those of view B.

    Source: attention-based fusion across views is AG-SSD's [paper]; the nearest published form is Alice's CASA
    [R: Alice]; the position bias from true geometry and the guards against copying are ours (docs/method.md §1.4).

    Args:
        dim: E.
        num_heads: attention heads.
        depth: blocks.
        mlp_ratio: MLP width over E.
        layer_scale: first value of the residual gains.
        norm: ``"pre"`` or ``"post"``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 6,
        depth: int = 2,
        mlp_ratio: float = 2.0,
        layer_scale: float | None = 1e-2,
        norm: Literal["pre", "post"] = "pre",
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CrossViewBlock(dim, num_heads, mlp_ratio, layer_scale, norm) for _ in range(depth))

    def forward(
        self, query: Tensor, memory: Tensor, bias: Tensor | None = None, forbidden: Tensor | None = None
    ) -> Tensor:
        """Return the fused tokens.

        Args:
            query: (B, Q, E), tokens of A or its [CLS]; each is fused by itself, so only those that are asked for.
            memory: (B, M, E), tokens of B without [CLS].
            bias: (B, Q, M) float32 added to attention logits times each head's gain; None for none, as for [CLS], which
                has no place.
            forbidden: (B, Q, M) bool, True where a query may not look; a query whose every key is forbidden may look
                everywhere. None forbids nothing.

        Returns:
            (B, Q, E).
        """
        if forbidden is not None:
            forbidden = forbidden & ~forbidden.all(-1, keepdim=True)
        for block in self.blocks:
            query = block(query, memory, bias, forbidden)
        return query


def position_bias(query: Tensor, memory: Tensor, grid: Size) -> tuple[Tensor, Tensor]:
    """Return how the tokens of one view, the queries, lie in another one.

    Args:
        query: (B, d + 1, d + 1) float32, ``u`` of the queries' view to parent voxels.
        memory: (B, d + 1, d + 1) float32, the same of the other view.
        grid: token grid of both.

    Returns:
        bias (B, N, N) float32 for attention, 0 for tokens less than half a token inside the other view; distance
        (B, N, N) float32 in token pitches of that view (largest axis).
    """
    u, valid = correspondence(query, memory, grid)
    pitch = constant(grid, u.device) / 2
    offset = (u[:, :, None] - token_centres(grid, u.device)[None, None]) * pitch  # (B, N, N, d)
    bias = -(offset**2).sum(-1) / (2 * _POSITION_PITCHES**2)
    bias = torch.where(valid[..., None], bias, torch.zeros_like(bias))
    return bias, offset.abs().amax(-1)


def forbidden_keys(
    random: KeyedRandom, mask: Tensor, distance: Tensor, key_dropout: float, counterpart_drop: float
) -> Tensor:
    """Return (B, N, N) bool, the keys that queries may not look at: dropped ones, and counterparts.

    Args:
        random: keyed by the B samples.
        mask: (B, N) bool, hidden tokens.
        distance: (B, N, N) of :func:`position_bias`.
        key_dropout: share of the keys that no query sees.
        counterpart_drop: share of the hidden tokens that do not see keys at their own place.
    """
    tokens = mask.shape[1]
    dropped = (random.uniform(tokens) < key_dropout)[:, None]
    alone = mask & (random.uniform(tokens) < counterpart_drop)
    counterpart = alone[..., None] & (distance < _COUNTERPART_PITCHES)
    return dropped | counterpart
