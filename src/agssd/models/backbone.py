"""The contract of every encoder: volumes or groups of masked views in, ``Features`` out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from agssd.types import Features, Size


class CropFeatures(NamedTuple):
    """Features of the views of B samples: V global views, two or one, and L local ones."""

    cls: Tensor  # (B, V, E)
    tokens: Tensor  # (B, V, N, E)
    local_cls: Tensor | None  # (B, L, E)
    attention: Tensor | None  # (B, V, heads, *grid) of the global [CLS], where record_cls_attention is set
    shared: tuple[Tensor, ...]  # normed outputs that losses read, as LossTerms.shared names them


class Backbone(nn.Module, ABC):
    """An encoder with a regular token grid of stride ``patch_size``.

    Nothing outside an implementation may rely on transformer blocks or on a [CLS] token; what it may rely on is listed
    here. A hierarchical encoder (Swin) gives its token stride as ``patch_size`` and its own ``level_*``.

    Attributes:
        in_channels: C of the input.
        patch_size: voxels per token and axis, tensor order; two numbers where the encoder takes frames (B, C, H, W).
        embed_dim: E of ``Features.cls`` and ``Features.tokens``.
        depth: number of skippable blocks: columns of ``drop_noise``.
        level_channels: E_i of each of ``Features.levels``, shallow to deep.
        level_strides: voxels per cell and axis of each of ``Features.levels``.
        config: ``{"class_path": ..., "init_args": {...}}`` of plain types; rebuilds an equal module (without weights).
        input_weight: name of the patch embedding's parameter (E, C, *patch), by which ``agssd.load_backbone`` adapts
            the encoder to other channels or patches; "" if it cannot be adapted.
        contract: how volumes must be prepared, set by ``agssd.load_backbone``; None otherwise.
        has_cls_attention: whether there is a [CLS] token whose attention can be asked for.
        can_leave_out: whether tokens can be left out (:meth:`forward_visible`).
        record_cls_attention: when True, each ``forward_views`` leaves ``last_cls_attention``; refused where there is
            no [CLS].
        last_cls_attention: per group (B_i, heads, *grid) float32, detached, of the last ``forward_views``.
    """

    in_channels: int
    patch_size: Size
    embed_dim: int
    depth: int
    level_channels: tuple[int, ...]
    level_strides: tuple[Size, ...]
    config: dict[str, Any]
    input_weight: str = ""
    contract: dict[str, Any] | None = None
    has_cls_attention: bool = False
    can_leave_out: bool = False
    last_cls_attention: list[Tensor] | None = None
    _record_cls_attention: bool = False
    drop_probs: tuple[float, ...]  # of each block to be skipped
    drop_prob_row: Tensor  # the same, (depth,)

    @property
    def spatial_dims(self) -> int:
        """Axes of space of the input: 3 for volumes, 2 for frames."""
        return len(self.patch_size)

    @property
    def record_cls_attention(self) -> bool:
        """Whether each ``forward_views`` leaves ``last_cls_attention``."""
        return self._record_cls_attention

    @record_cls_attention.setter
    def record_cls_attention(self, wanted: bool) -> None:
        if wanted and not self.has_cls_attention:
            raise ValueError(self._no_cls())
        self._record_cls_attention = wanted

    def _no_cls(self) -> str:
        return (
            f"this {type(self).__name__} has no [CLS] token, hence no attention of [CLS]; use a ViT with "
            "class_token: true, or a mask score that does not ask for it"
        )

    def refuse_without_leaving_out(self) -> None:
        """Refuse this encoder where a recipe will need :meth:`forward_visible`.

        Raises:
            ValueError: if it cannot leave tokens out.
        """
        if not self.can_leave_out:
            raise ValueError(
                f"{type(self).__name__} cannot leave tokens out; use a ViT, or SimMIM instead of MAE; for AG-SSD, "
                "student_views both or masked"
            )

    @abstractmethod
    def forward(self, x: Tensor, drop_noise: Tensor | None = None) -> Features:
        """Return features of unmasked volumes with ``levels`` filled.

        Args:
            x: (B, C, [D,] H, W) in the model's intensity range; D, H, W divisible by ``patch_size``.
            drop_noise: (B, depth) uniforms in [0, 1) for stochastic depth, or None for no drop.

        Raises:
            ValueError: if the channels or the shape do not fit.
        """

    @abstractmethod
    def forward_views(
        self,
        views: list[Tensor],
        masks: list[Tensor | None] | None = None,
        drop_noise: list[Tensor | None] | None = None,
    ) -> list[Features]:
        """Return features of groups of views; ``levels`` stay empty.

        Args:
            views: groups (B_i, C, [D_i,] H_i, W_i), each group of one shape.
            masks: per group (B_i, *grid) bool, True = hidden from the encoder, or None.
            drop_noise: per group (B_i, depth) uniforms in [0, 1) for stochastic depth, or None for no drop.

        Raises:
            ValueError: if a shape does not fit.
        """

    def forward_crops(
        self,
        global_views: Tensor,
        local_views: Tensor | None = None,
        mask: Tensor | None = None,
        drop_noise: list[Tensor | None] | None = None,
    ) -> CropFeatures:
        """Return features of the global views and the local views of every sample, in one pass.

        Args:
            global_views: (B, V, C, [D,] H, W), two of each sample, or one where the other is not asked for.
            local_views: (B, L, C, [d,] h, w) or None.
            mask: (B, V, *grid) bool of the global views, True = hidden, or None.
            drop_noise: as for :meth:`forward_views`, for one group of global and one of local views.
        """
        groups = [global_views.flatten(0, 1)]
        masks = [None if mask is None else mask.flatten(0, 1)]
        if local_views is not None:
            groups.append(local_views.flatten(0, 1))
            masks.append(None)
        features = self.forward_views(groups, masks, drop_noise)
        batch = global_views.shape[0]
        cls, tokens = features[0].cls.unflatten(0, (batch, -1)), features[0].tokens.unflatten(0, (batch, -1))
        local_cls = None if local_views is None else features[1].cls.unflatten(0, (batch, -1))
        attention = None
        if self.record_cls_attention and self.last_cls_attention is not None:
            attention, self.last_cls_attention = self.last_cls_attention[0].unflatten(0, (batch, -1)), None
        return CropFeatures(cls, tokens, local_cls, attention, (features[0].tokens, *(group.cls for group in features)))

    def forward_visible(self, x: Tensor, visible: Tensor, drop_noise: Tensor | None = None) -> Features:
        """Return features of volumes of which only some patches enter the encoder; cost follows their number.

        Args:
            x: (B, C, [D,] H, W).
            visible: (B, M) int64, positions of these patches in the raster order of the grid.
            drop_noise: (B, depth) uniforms in [0, 1) for stochastic depth, or None for no drop.

        Returns:
            ``tokens`` (B, M, E) in the order of ``visible``, ``grid`` that of the whole volume, no ``levels``.

        Raises:
            ValueError: if this encoder cannot leave tokens out, or a shape does not fit.
        """
        self.refuse_without_leaving_out()
        raise NotImplementedError  # an encoder that says it can_leave_out brings its own

    def freeze_mask_token(self) -> None:
        """Stop training what only masked views would train; called by recipes that mask nothing by a token."""

    def freeze_patch_embedding(self) -> None:
        """Stop training the projection of patches, and leave it as it is.

        Raises:
            ValueError: if this encoder has no single one.
        """
        raise ValueError(
            f"{type(self).__name__} has no patch embedding to freeze; set model.freeze_patch_embedding to false"
        )

    def cls_attention(self, x: Tensor) -> Tensor:
        """Return the attention of [CLS] to each token in the last block, (B, heads, *grid).

        Raises:
            ValueError: if this encoder has no [CLS] token.
        """
        raise ValueError(self._no_cls())

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the repeated parts in place; parameter names and the state dict stay as they are.

        Args:
            backend: of ``torch.compile``.

        Raises:
            ValueError: if this encoder cannot be compiled.
        """
        raise ValueError(f"{type(self).__name__} cannot be compiled; set model.compile to false")

    def shardable_parts(self) -> list[nn.Module]:
        """Return large modules whose parameters are read in their own ``forward`` alone; may be empty.

        FSDP2 gathers these one by one, and everything else for the whole of a step.
        """
        return []

    def no_weight_decay(self) -> set[str]:
        """Return names of parameters that must not decay beyond biases and norms (tokens)."""
        return set()

    def layer_index(self, name: str) -> int:
        """Return the layer that parameter ``name`` belongs to, for layer-wise learning rates.

        0 is the embedding, ``1 .. depth`` are the blocks, ``depth + 1`` is what follows them.
        """
        return self.depth + 1

    def token_grid(self, shape: tuple[int, ...]) -> Size:
        """Return the token grid of an input of ``shape`` (B, C, [D,] H, W) or ([D,] H, W).

        Raises:
            ValueError: if a size is zero or not divisible by the patch, or the number of axes is not the encoder's.
        """
        dims = self.spatial_dims
        if len(shape) not in (dims, dims + 2):
            other = 5 - dims
            raise ValueError(
                f"sizes are {tuple(shape)}, but this {type(self).__name__} takes {dims} axes of space; give sizes of "
                f"{dims} numbers, or an encoder for {other} (a ViT with spatial_dims: {other})"
            )
        size = tuple(shape[-dims:])
        if any(s == 0 or s % p for s, p in zip(size, self.patch_size, strict=True)):
            fit = tuple(max(1, s // p) * p for s, p in zip(size, self.patch_size, strict=True))
            raise ValueError(
                f"input of {size} voxels is not divisible by patch_size {self.patch_size}; crop or pad it to {fit}, say"
            )
        return tuple(s // p for s, p in zip(size, self.patch_size, strict=True))

    def check_groups(self, views: list[Tensor], **given: list[Tensor | None] | None) -> None:
        """Refuse ``masks`` or ``drop_noise``, named as keywords, that are not one per group of views.

        Raises:
            ValueError: naming the argument and both counts.
        """
        for name, entries in given.items():
            if entries is not None and len(entries) != len(views):
                raise ValueError(
                    f"{name} has {len(entries)} entries for {len(views)} groups of views; give one per group"
                )

    def check_mask(self, mask: Tensor, samples: int, grid: Size) -> None:
        """Refuse a mask that is not bool of shape (B, *grid).

        Raises:
            ValueError: naming what it is and what is expected.
        """
        if mask.dtype != torch.bool or tuple(mask.shape) != (samples, *grid):
            raise ValueError(
                f"mask is {mask.dtype} {tuple(mask.shape)}; expected bool {(samples, *grid)}, True = hidden"
            )

    def check_drop_noise(self, noise: Tensor, samples: int) -> None:
        """Refuse draws for stochastic depth that are not of shape (B, depth).

        Raises:
            ValueError: naming both shapes.
        """
        if tuple(noise.shape) != (samples, self.depth):
            raise ValueError(
                f"drop_noise has shape {tuple(noise.shape)}; expected (B, depth) = {(samples, self.depth)}"
            )

    def keep_factors(self, noise: Tensor | None, samples: int) -> Tensor | None:
        """Return (depth, B, 1, ..., 1) float32 factors of the blocks' branches, or None if nothing can drop.

        For encoders with ``drop_probs`` and the same as a buffer, ``drop_prob_row``. 0 = skipped, else 1 / (1 - prob).

        Raises:
            ValueError: if ``noise`` is not (B, depth).
        """
        if noise is not None:
            self.check_drop_noise(noise, samples)
        if noise is None or self.drop_probs[-1] == 0.0:
            return None
        prob = self.drop_prob_row.float()
        factors: Tensor = (noise >= prob).float() / (1 - prob)
        return factors.t().reshape(self.depth, samples, *[1] * (self.spatial_dims + 1))

    def check_input(self, x: Tensor) -> Size:
        """Return the token grid of ``x`` (B, C, [D,] H, W).

        Raises:
            ValueError: if ``x`` has other axes than these or other channels than ``in_channels``, or does not divide by
                the patch.
        """
        if x.ndim != self.spatial_dims + 2:
            axes = "D, H, W" if self.spatial_dims == 3 else "H, W"
            raise ValueError(f"input has shape {tuple(x.shape)}; expected (B, C, {axes})")
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f"input has {x.shape[1]} channels, the backbone takes in_channels={self.in_channels}; "
                f"pass in_channels={x.shape[1]} when building or loading it"
            )
        return self.token_grid(tuple(x.shape))


def drop_probabilities(drop_path: float, depth: int) -> tuple[float, ...]:
    """Return the drop probability of each block: rises linearly from 0 at the first to ``drop_path`` at the last.

    Raises:
        ValueError: if ``drop_path`` is no probability below 1.
    """
    if not 0.0 <= drop_path < 1.0:
        raise ValueError(f"drop_path is {drop_path}; use a probability in [0, 1)")
    return tuple(drop_path * (i / (depth - 1) if depth > 1 else 1.0) for i in range(depth))


def build_fresh(config: dict[str, Any], seed: int = 0) -> Backbone:
    """Return an encoder of ``config`` (see :class:`Backbone`) with fresh weights, in evaluation mode.

    The weights depend on ``seed`` alone, and the global random state on the CPU stays as it was.
    """
    module, _, name = config["class_path"].rpartition(".")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = getattr(import_module(module), name)(**config["init_args"])
    assert isinstance(fresh, Backbone)
    return fresh.eval()
