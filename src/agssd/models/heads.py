"""Heads of the pretraining losses.

What they return, and what it is worked out from directly, is fp32 whatever the precision of the encoder. The hidden
layers of :class:`PrototypeHead`, most of its work, follow the encoder into bf16, whose range is that of fp32; not into
fp16, in which heads overflow.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agssd.distributed import all_sum
from agssd.models.backbone import Backbone
from agssd.transforms.masking import gather_tokens
from agssd.types import Features, Size


class PrototypeHead(nn.Module):
    """Project features to cosine similarities with K prototypes: MLP, centring, L2 norm, normalised linear.

    The prototypes are normalised, so logits lie in [-1, 1] (the weight-norm gain is frozen at 1). With
    ``centre_momentum`` a running mean of the teacher's bottleneck is subtracted before the L2 norm, in student and
    teacher alike: what all crops share no longer fills the unit sphere, so a fixed temperature finds the differences
    between crops at any anatomy and stage of training.

    Source: DINO and iBOT head [R: iBOT]; the centred bottleneck is ours, against the uniform [CLS] of small anatomy.

    Args:
        embed_dim: E.
        num_prototypes: K.
        hidden_dim: width of the two hidden layers.
        bottleneck_dim: width before the prototypes.
        centre_momentum: share of the old mean that is kept per optimiser step; None leaves the bottleneck as it is.

    Raises:
        ValueError: if a size is below 1.
    """

    mean: Tensor
    updates: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_prototypes: int = 8192,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        centre_momentum: float | None = None,
    ) -> None:
        super().__init__()
        if min(num_prototypes, hidden_dim, bottleneck_dim) < 1:
            raise ValueError(
                f"num_prototypes is {num_prototypes}, head_hidden {hidden_dim} and head_bottleneck {bottleneck_dim}; "
                "give at least 1 each"
            )
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
        self.register_buffer("mean", torch.zeros(bottleneck_dim))
        self.register_buffer("updates", torch.zeros(()))
        self._observed: Tensor | None = None  # (bottleneck + 1,), no buffer: see losses.distillation.Centre

    def forward(self, x: Tensor, observe: Tensor | None = None) -> Tensor:
        """Return (..., K) float32 cosines from features (..., E).

        Args:
            x: features.
            observe: (...) weight of each row in the running mean, given for the teacher's rows; None takes none.
        """
        with torch.autocast(x.device.type, enabled=_in_bf16(x.device.type)):
            z = self.mlp[:-1](x.float())
        with torch.autocast(x.device.type, enabled=False):
            z = self.mlp[-1](z.float())
            if observe is not None and self.centre_momentum is not None:
                weight = observe.flatten().float()
                seen = torch.cat([weight @ z.detach().flatten(0, -2), weight.sum()[None]])
                self._observed = seen if self._observed is None else self._observed + seen
            z = F.normalize(z - self.mean, dim=-1, eps=1e-6)
            return F.linear(z, F.normalize(self.prototypes.float(), dim=-1, eps=1e-6))

    @torch.no_grad()
    def moved_mean(self) -> Tensor | None:
        """Return the running mean after the rows observed since the last call, over all ranks; None if it stays.

        The first update takes the mean of its rows, later ones keep ``centre_momentum`` of the old mean at most.
        """
        if self.centre_momentum is None:
            return None
        observed = self._observed if self._observed is not None else self.mean.new_zeros(len(self.mean) + 1)
        self._observed = None
        total = all_sum(observed)
        kept = torch.clamp(self.updates / (self.updates + 1), max=self.centre_momentum)
        new = torch.lerp(total[:-1] / total[-1].clamp_min(1e-6), self.mean, kept)
        self.updates += (total[-1] > 0).float()
        return torch.where(total[-1] > 0, new, self.mean)


def _in_bf16(device_type: str) -> bool:
    return torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) is torch.bfloat16


@torch.no_grad()
def move_means(teacher: nn.ModuleDict, student: nn.ModuleDict) -> None:
    """Move the running mean of every :class:`PrototypeHead` by what the teacher's saw; student and teacher share it.

    Called once per optimiser step; over all ranks.
    """
    for name, head in teacher.items():
        mean = head.moved_mean() if isinstance(head, PrototypeHead) else None
        if mean is None:
            continue
        for own in (cast(PrototypeHead, head), cast(PrototypeHead, student[name])):
            own.mean.copy_(mean)
            own.updates.copy_(cast(PrototypeHead, head).updates)


class ReconstructionHead(nn.Module):
    """Predict the voxels of a patch from its token: LayerNorm and one linear layer (SimMIM) [R: SimMIM].

    Args:
        embed_dim: E.
        patch_size: p.
        channels: C.
    """

    def __init__(self, embed_dim: int, patch_size: Size, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.linear = nn.Linear(embed_dim, math.prod(patch_size) * channels)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (..., P), P voxels of a patch times C, float32 from tokens (..., E)."""
        with torch.autocast(tokens.device.type, enabled=False):
            predicted: Tensor = self.linear(self.norm(tokens.float()))
        return predicted


class PointNorm(nn.Module):
    """Standardise each channel over the points of one view, then scale and shift it.

    Source: ours: what batch norm does against collapse, without tying samples together.

    Args:
        width: channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., M, width) from (..., M, width), M points."""
        centred = x - x.mean(-2, keepdim=True)
        deviation = (centred.square().mean(-2, keepdim=True) + 1e-5).sqrt()
        return centred / deviation * self.weight + self.bias


class ProjectionHead(nn.Module):
    """Project features for a contrast or a prediction: linear layers with layer norm and GELU between them.

    Source: projector and predictor of MoCo v3 and BYOL [R: MoCo v3].
    Deviates: layer norm in place of batch norm, whose statistics would tie the samples of a batch together and say
    little for the few volumes that fit a device (docs/method.md (b) 11).

    Args:
        in_dim: width of the features.
        hidden_dim: width of the hidden layers.
        out_dim: width of the projection.
        layers: number of linear layers, at least 1.
        over_points: standardise hidden channels over the points of a view (:class:`PointNorm`) and not over channels.

    Raises:
        ValueError: if a width is below 1.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, layers: int, over_points: bool = False) -> None:
        super().__init__()
        if min(hidden_dim, out_dim) < 1:
            raise ValueError(f"head_hidden is {hidden_dim} and head_dim {out_dim}; give at least 1 each")
        widths = [in_dim, *[hidden_dim] * (layers - 1), out_dim]
        parts: list[nn.Module] = []
        for number, (width, following) in enumerate(pairwise(widths)):
            if number:
                parts += [PointNorm(width) if over_points else nn.LayerNorm(width, eps=1e-6), nn.GELU()]
            linear = nn.Linear(width, following)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
            parts.append(linear)
        self.mlp = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_dim) float32 from features (..., in_dim); not normalised."""
        with torch.autocast(x.device.type, enabled=False):
            projected: Tensor = self.mlp(x.float())
        return projected


def predict_hidden(
    network: nn.ModuleDict, head: str, views: Tensor, mask: Tensor, index: Tensor, drop_noise: Tensor | None = None
) -> tuple[Tensor, Features]:
    """Return what a head predicts of hidden patches, (B, M, ...), and the encoder's features of the masked views.

    Args:
        network: student or teacher, with ``"backbone"`` and the head.
        head: its name; it takes tokens (B, M, E).
        views: (B, C, [D,] H, W).
        mask: (B, *grid) bool, True = hidden.
        index: (B, M) int64, positions of the patches to predict.
        drop_noise: (B, depth) uniforms in [0, 1) for stochastic depth, or None for no drop.
    """
    features = cast(Backbone, network["backbone"]).forward_views([views], [mask], [drop_noise])[0]
    return network[head](gather_tokens(features.tokens, index)), features
