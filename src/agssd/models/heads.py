"""Heads of the pretraining losses; they run in fp32 whatever the precision of the encoder."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agssd.distributed import all_sum
from agssd.types import Triple


class PrototypeHead(nn.Module):
    """Project features to cosine similarities with K prototypes: MLP, centring, L2 norm, normalised linear.

    The prototypes are normalised, so logits lie in [-1, 1] (the weight-norm gain is frozen at 1). With
    ``centre_momentum`` a running mean of the teacher's bottleneck is subtracted before the L2 norm, in student and
    teacher alike: what all crops share no longer fills the unit sphere, so a fixed temperature finds the differences
    between crops at any anatomy and stage of training. With ``num_places`` every place of a view has its own mean, so
    that prototypes cannot stand for the place itself, which teacher and student know from the position code alone.

    Source: DINO and iBOT head [R: iBOT]; the centred bottleneck is ours, against the uniform [CLS] of small anatomy,
    and so are its places (docs/evidence.md: without them two thirds of what patch prototypes tell is the place).

    Args:
        embed_dim: E.
        num_prototypes: K.
        hidden_dim: width of the two hidden layers.
        bottleneck_dim: width before the prototypes.
        centre_momentum: share of the rows seen so far that a mean keeps per optimiser step; None leaves the bottleneck
            as it is.
        num_places: tokens of a view, for heads on tokens; 1 keeps one mean.
    """

    mean: Tensor
    rows: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_prototypes: int = 8192,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        centre_momentum: float | None = None,
        num_places: int = 1,
    ) -> None:
        super().__init__()
        self.centre_momentum = centre_momentum
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.randn(num_prototypes, bottleneck_dim) / math.sqrt(bottleneck_dim))
        self.register_buffer("mean", torch.zeros(num_places, bottleneck_dim))
        self.register_buffer("rows", torch.zeros(num_places, 1))  # behind each mean, older ones weighing less
        # (num_places, bottleneck + 1): sums of rows, then their number; no buffer: see losses.distillation.Centre
        self._observed: Tensor | None = None

    def forward(self, x: Tensor, observe: Tensor | None = None, place: Tensor | None = None) -> Tensor:
        """Return (..., K) float32 cosines from features (..., E).

        Args:
            x: features.
            observe: (...) weight of each row in the running mean, given for the teacher's rows; None takes none.
            place: (...) int64 below ``num_places``; None where there is one.
        """
        with torch.autocast(x.device.type, enabled=False):
            z = self.mlp(x.float())
            if self.centre_momentum is not None:
                if observe is not None:
                    self._observe(z.detach().flatten(0, -2), observe.flatten().float(), place)
                centre = self.centre()
                z = z - (centre[0] if place is None else centre[place])
            z = F.normalize(z, dim=-1, eps=1e-6)
            return F.linear(z, F.normalize(self.prototypes.float(), dim=-1, eps=1e-6))

    def _observe(self, rows: Tensor, weight: Tensor, place: Tensor | None) -> None:
        if self._observed is None:
            self._observed = rows.new_zeros(len(self.rows), rows.shape[1] + 1)
        weighted = torch.cat([rows, torch.ones_like(rows[:, :1])], 1) * weight[:, None]
        if place is None:
            self._observed[0] += weighted.sum(0)
        else:  # a product and no index_add, whose order of summation is not fixed on CUDA
            member = F.one_hot(place.flatten(), len(self.rows)).to(rows.dtype)
            self._observed += member.T @ weighted

    def centre(self) -> Tensor:
        """Return (num_places, bottleneck), what is subtracted at each place.

        It is the mean of the place's rows and of one row more, the mean of all places: a place never seen takes that.
        """
        overall = (self.rows * self.mean).sum(0) / self.rows.sum().clamp_min(1e-6)
        return (self.rows * self.mean + overall) / (self.rows + 1)

    @torch.no_grad()
    def moved_mean(self) -> tuple[Tensor, Tensor] | None:
        """Return ``mean`` and ``rows`` after all ranks' rows since the last call; None without centring.

        Each mean is one over rows, of which older ones weigh less by ``centre_momentum`` per step that saw any.
        """
        if self.centre_momentum is None:
            return None
        observed, self._observed = self._observed, None
        if observed is None:
            observed = torch.cat([self.mean, self.rows], 1).zero_()
        total = all_sum(observed)
        kept = torch.where(total[:, -1].sum() > 0, self.centre_momentum, 1.0) * self.rows
        rows = kept + total[:, -1:]
        return (kept * self.mean + total[:, :-1]) / rows.clamp_min(1e-6), rows


class ReconstructionHead(nn.Module):
    """Predict the voxels of a patch from its token: LayerNorm and one linear layer (SimMIM) [R: SimMIM].

    Args:
        embed_dim: E.
        patch_size: p.
        channels: C.
    """

    def __init__(self, embed_dim: int, patch_size: Triple, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.linear = nn.Linear(embed_dim, patch_size[0] * patch_size[1] * patch_size[2] * channels)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (..., p³ C) float32 from tokens (..., E)."""
        with torch.autocast(tokens.device.type, enabled=False):
            predicted: Tensor = self.linear(self.norm(tokens.float()))
        return predicted
