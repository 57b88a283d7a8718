"""MONAI's SwinUNETR encoder as a backbone: attention in shifted windows over a pyramid of grids."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from monai.networks.nets.swin_unetr import SwinTransformer, compute_mask, get_window_size
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from agssd.geometry import axis_names, sizes_of
from agssd.models.backbone import Backbone, drop_probabilities
from agssd.types import Features, Size

Downsample = Literal["mergingv2", "merging", "merging_1.4"]
# Order in which the eight cells of a 2 x 2 x 2 block, numbered in raster order, are put side by side.
MERGING: dict[str, tuple[int, ...]] = {
    "mergingv2": (0, 1, 2, 3, 4, 5, 6, 7),
    "merging": (0, 4, 2, 1, 6, 5, 3, 7),
    "merging_1.4": (0, 4, 2, 1, 5, 2, 1, 7),  # two cells twice, two never: what released weights were trained with
}
MERGING_OF_FRAMES = (0, 2, 1, 3)  # of the four cells of a 2 x 2 block, under every name and in every version
COMPILED_GRAPHS = 64  # two per stage (shifted or not), per size of view, with and without gradient


def merge_cells(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return (B, D/2, H/2, W/2, 8E) from (B, D, H, W, E): the cells of each 2 x 2 x 2 block in ``order``.

    From (B, H, W, E) it is (B, H/2, W/2, 4E).
    """
    dims = x.ndim - 2
    cells, within, whole = axis_names(dims)
    parts = rearrange(x, f"b {whole} e -> ({within}) b {cells} e", **sizes_of(within, (2,) * dims)).unbind(0)
    return torch.cat([parts[i] for i in order], -1)


@lru_cache(maxsize=16)
def attention_mask(grid: Size, window: Size, shift: Size, device: torch.device) -> Tensor:
    """Return (windows, n, n) float32, -100 between cells that only the cyclic shift has brought together.

    Made once per grid, window and device, for student and teacher: it holds (windows * n^2) numbers, 160 MB for a grid
    of 48 with windows of 7.
    """
    padded = [-(-cells // size) * size for cells, size in zip(grid, window, strict=True)]
    with torch.inference_mode(False):  # the cache outlives the context it was filled in
        mask: Tensor = compute_mask(padded, window, shift, device)
    return mask


def run_block(block: nn.Module, x: Tensor, mask: Tensor | None, keep: Tensor | None) -> Tensor:
    """Return (B, [D,] H, W, E) after one block of MONAI, whose own random stochastic depth is left out.

    Args:
        block: a ``SwinTransformerBlock``.
        x: (B, [D,] H, W, E) residual stream.
        mask: of its windows if they are shifted, see :func:`attention_mask`.
        keep: (B, 1, ..., 1) factor of both branches: 0 = the sample skips this block, else 1 / (1 - drop_prob).
    """
    part: Any = block  # MONAI declares the types of neither half
    branch = part.forward_part1(x, mask)
    x = x + (branch if keep is None else branch * keep)
    branch = part.mlp(part.norm2(x))
    out: Tensor = x + (branch if keep is None else branch * keep)
    return out


class SwinUNETREncoder(Backbone):
    """The encoder of MONAI's SwinUNETR (``swinViT``), or its first stages.

    Patches of ``patch_embed_stride`` voxels become cells; every stage attends within windows, every other block within
    windows moved by half, and then joins 2 x 2 x 2 cells to one of twice the channels. ``levels`` are the maps after
    the embedding and after each stage, normed without gain as MONAI's ``swinViT`` returns them; ``tokens`` are the last
    of them, so ``patch_size`` is ``patch_embed_stride * 2**stages``. Fewer stages give finer tokens.

    There is no [CLS]: ``cls`` is the mean token, of hidden places too, as in DINO and iBOT on Swin [R: iBOT]. Masks are
    on the grid of tokens; a learned cell takes the place of all cells of a hidden token, so cost does not follow the
    visible share [R: SimMIM]. Stochastic depth follows ``drop_noise``. The modules and their parameter names are
    MONAI's, below ``swinViT.``; :mod:`agssd.models.monai_swin_keys` takes weights over and gives them back. The
    residual stream stays float32 under autocast.

    Where a grid is smaller than the window, MONAI shrinks the window but looks biases up as for the first cells of the
    full one, so that they no longer belong to offsets; this is kept for equality. A window that fits the smallest grid
    avoids it.

    Source: Hatamizadeh et al. 2022, arXiv 2201.01266; MONAI's implementation.
    Deviates: the order in which cells are joined is stated here, because MONAI's "merging" differs between its versions
    1.4 and 1.5; stochastic depth is keyed by sample.

    Args:
        in_channels: C.
        feature_size: channels of the first map; doubled by each stage.
        patch_embed_stride: voxels per cell of the first map and axis, one number or ([D,] H, W).
        depths: blocks of each stage; as many stages as numbers, 1 to 4.
        num_heads: heads of each stage; divide its channels.
        window_size: cells of a window per axis, one number or ([D,] H, W).
        mlp_ratio: hidden width of the MLP over the channels.
        use_v2: a residual convolution before each stage (SwinUNETR-V2).
        downsample: how cells are joined. "mergingv2" is the same in every MONAI; "merging" is MONAI's default from
            version 1.5 on, and "merging_1.4" up to 1.4, by which most released weights were trained. Of frames, where
            MONAI has one order, they are the same.
        drop_path: drop probability of the last block; rises linearly from 0 at the first. Acts only on views whose
            ``drop_noise`` is given, in train and eval mode alike.
        use_checkpoint: compute blocks anew in the backward pass, for less memory and more time.
        spatial_dims: 3 for volumes, 2 for frames (B, C, H, W).
    """

    input_weight = "swinViT.patch_embed.proj.weight"

    def __init__(
        self,
        in_channels: int = 1,
        feature_size: int = 48,
        patch_embed_stride: int | Size = 2,
        depths: tuple[int, ...] = (2, 2, 2, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window_size: int | Size = 7,
        mlp_ratio: float = 4.0,
        use_v2: bool = False,
        downsample: Downsample = "mergingv2",
        drop_path: float = 0.0,
        use_checkpoint: bool = False,
        spatial_dims: int = 3,
    ) -> None:
        """Build the encoder; see the class for the arguments.

        Raises:
            ValueError: if sizes do not fit each other.
        """
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims is {spatial_dims}; use 3 for volumes or 2 for frames")
        stride = _per_axis("patch_embed_stride", patch_embed_stride, spatial_dims)
        window = _per_axis("window_size", window_size, spatial_dims)
        self.stages = len(depths)
        if not 1 <= self.stages <= 4 or len(num_heads) != self.stages:
            raise ValueError(
                f"depths={tuple(depths)} and num_heads={tuple(num_heads)} must name the same 1 to 4 stages, one number "
                "each"
            )
        if min(in_channels, feature_size, *stride, *depths, *num_heads, *window) < 1:
            raise ValueError("channels, sizes, depths and heads must be at least 1")
        for stage, heads in enumerate(num_heads):
            if feature_size * 2**stage % heads:
                raise ValueError(
                    f"num_heads={tuple(num_heads)}: {heads} does not divide the {feature_size * 2**stage} channels of "
                    f"stage {stage + 1}"
                )
        if downsample not in MERGING:
            raise ValueError(f"downsample {downsample!r} is unknown; use one of {', '.join(MERGING)}")
        self.in_channels = in_channels
        self.depths = tuple(depths)
        self.depth = sum(depths)
        self.embed_dim = feature_size * 2**self.stages
        self.patch_size = tuple(n * 2**self.stages for n in stride)
        self.level_channels = tuple(feature_size * 2**i for i in range(self.stages + 1))
        self.level_strides = tuple(tuple(n * 2**i for n in stride) for i in range(self.stages + 1))
        self.downsample = downsample
        self.merging = MERGING[downsample] if spatial_dims == 3 else MERGING_OF_FRAMES
        self.use_checkpoint = use_checkpoint
        self.drop_probs = drop_probabilities(drop_path, self.depth)
        self.drop_prob_row: Tensor
        self.register_buffer("drop_prob_row", torch.tensor(self.drop_probs), persistent=False)
        self.config = {
            "class_path": "agssd.models.swin_unetr.SwinUNETREncoder",
            "init_args": {
                "in_channels": in_channels,
                "feature_size": feature_size,
                "patch_embed_stride": list(stride),
                "depths": list(depths),
                "num_heads": list(num_heads),
                "window_size": list(window),
                "mlp_ratio": mlp_ratio,
                "use_v2": use_v2,
                "downsample": downsample,
                "drop_path": drop_path,
                "use_checkpoint": use_checkpoint,
                "spatial_dims": spatial_dims,
            },
        }
        self.swinViT = SwinTransformer(
            in_chans=in_channels,
            embed_dim=feature_size,
            window_size=window,
            patch_size=stride,
            depths=depths,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            use_v2=use_v2,
            spatial_dims=spatial_dims,
        )
        self.mask_token = nn.Parameter(torch.empty(feature_size))
        nn.init.normal_(self.mask_token, std=0.02)
        self._run_block: Callable[..., Tensor] = run_block

    def no_weight_decay(self) -> set[str]:
        """Return names of the mask token and the tables of position biases."""
        return {n for n, _ in self.named_parameters() if n == "mask_token" or n.endswith("position_bias_table")}

    def layer_index(self, name: str) -> int:
        """Return 0 for embedding and mask token, 1 .. depth for blocks, depth + 1 for the last merging.

        The convolution before a stage counts with its first block, an earlier merging with the block before it.
        """
        part = name.removeprefix("swinViT.layers")
        if part == name:
            return 0
        stage, rest = int(part[0]) - 1, part[1:].split(".")
        before = sum(self.depths[:stage])
        if rest[0] == "c":
            return before + 1
        if rest[2] == "downsample":
            return before + self.depths[stage] + (stage == self.stages - 1)
        return before + int(rest[3]) + 1

    def freeze_mask_token(self) -> None:
        """Stop training the cell that replaces hidden ones."""
        self.mask_token.requires_grad_(False)

    def freeze_patch_embedding(self) -> None:
        """Stop training the projection of patches, weight and bias."""
        self.swinViT.patch_embed.requires_grad_(False)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the blocks with static shapes; parameter names and the state dict stay as they are.

        Raises torch's limit of graphs per function for the whole process, because each kind of block and view has one.

        Args:
            backend: of ``torch.compile``.
        """
        import torch._dynamo.config as limits

        limits.cache_size_limit = max(limits.cache_size_limit, COMPILED_GRAPHS)
        self._run_block = torch.compile(run_block, dynamic=False, fullgraph=True, backend=backend)

    def _embed(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return cells (B, [D_0,] H_0, W_0, E_0) in the dtype of the weights, hidden ones replaced."""
        grid = self.check_input(x)
        if mask is not None:
            self.check_mask(mask, len(x), grid)
        cells = self.swinViT.patch_embed(x).movedim(1, -1).to(self.mask_token.dtype)
        if mask is None:
            return torch.add(cells, self.mask_token, alpha=0)  # keeps every parameter in the graph, as DDP needs
        for axis in range(1, mask.ndim):
            mask = mask.repeat_interleave(2**self.stages, axis)
        hidden: Tensor = torch.where(mask[..., None], self.mask_token, cells)
        return hidden

    def _maps(self, x: Tensor, mask: Tensor | None, noise: Tensor | None) -> list[Tensor]:
        """Return the maps (B, [D_i,] H_i, W_i, E_i) after the embedding and after each stage, not normed."""
        keep = self.keep_factors(noise, len(x))
        x, done = self._embed(x, mask), 0
        maps = [x]
        for stage in range(1, self.stages + 1):
            layer: Any = self.swinViT.get_submodule(f"layers{stage}.0")
            if self.swinViT.use_v2:
                convolved = self.swinViT.get_submodule(f"layers{stage}c.0")(x.movedim(-1, 1).contiguous())
                x = convolved.movedim(1, -1).to(x.dtype)
            grid = tuple(x.shape[1:-1])
            window, shift = get_window_size(grid, layer.window_size, layer.shift_size)
            windows = attention_mask(grid, window, shift, x.device) if any(shift) else None
            for block in layer.blocks:
                given = (block, x.contiguous(), windows, None if keep is None else keep[done])
                if self.use_checkpoint and torch.is_grad_enabled():
                    x = checkpoint(self._run_block, *given, use_reentrant=False)
                else:
                    x = self._run_block(*given)
                done += 1
            merging = layer.downsample
            x = merging.reduction(merging.norm(merge_cells(x, self.merging))).to(x.dtype)
            maps.append(x)
        return maps

    def _normed(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:])

    def _features(self, last: Tensor, levels: list[Tensor]) -> Features:
        tokens = last.flatten(1, -2)
        return Features(tokens.mean(1), tokens, tuple(last.shape[1:-1]), levels)

    def forward(self, x: Tensor, drop_noise: Tensor | None = None) -> Features:
        """Return features of unmasked volumes or frames; ``levels`` are the hidden states of MONAI's ``swinViT``.

        Args:
            x: (B, C, [D,] H, W) in the model's intensity range.
            drop_noise: (B, depth) uniforms in [0, 1), or None, as for :meth:`forward_views`.

        Raises:
            ValueError: if channels or shape do not fit.
        """
        levels = self.hidden_states(x, drop_noise=drop_noise)
        return self._features(levels[-1].movedim(1, -1), levels)

    def hidden_states(self, x: Tensor, normalize: bool = True, drop_noise: Tensor | None = None) -> list[Tensor]:
        """Return the maps (B, E_i, [D_i,] H_i, W_i) after the embedding and after each stage, normed or not."""
        maps = self._maps(x, None, drop_noise)
        return [(self._normed(m) if normalize else m).movedim(-1, 1).contiguous() for m in maps]

    def forward_views(
        self,
        views: list[Tensor],
        masks: list[Tensor | None] | None = None,
        drop_noise: list[Tensor | None] | None = None,
    ) -> list[Features]:
        """Return features of groups of views, one pass per group; ``levels`` stay empty.

        Sample b skips block l iff ``drop_noise[i][b, l] < drop_probs[l]``; kept samples are scaled by
        ``1 / (1 - drop_probs[l])``. Nothing is drawn here, so results do not depend on how a batch is cut.

        Args:
            views: groups (B_i, C, [D_i,] H_i, W_i).
            masks: per group (B_i, *grid) bool, True = the cells of this token replaced by the mask token; or None.
            drop_noise: per group (B_i, depth) uniforms in [0, 1), or None.

        Raises:
            ValueError: if a shape does not fit.
        """
        self.check_groups(views, masks=masks, drop_noise=drop_noise)
        empty: list[Tensor | None] = [None] * len(views)
        groups = zip(views, masks or empty, drop_noise or empty, strict=True)
        return [self._features(self._normed(self._maps(*group)[-1]), []) for group in groups]


def _per_axis(name: str, value: int | Size, dims: int) -> Size:
    """Return one number per axis of space.

    Raises:
        ValueError: if there are more or fewer.
    """
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims:
        raise ValueError(f"{name} is {list(values)}; give one number, or {dims} with spatial_dims: {dims}")
    return values
