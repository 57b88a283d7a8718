"""A vision transformer, in 3D or 2D, whose groups of views share one pass over the linear layers."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from agssd.geometry import INTERPOLATION, axis_names, sizes_of
from agssd.models.backbone import Backbone, drop_probabilities
from agssd.models.position import Rotation, rotary_angles, rotate, sincos_position
from agssd.types import Features, Size

SIZES = {  # embed_dim, depth, num_heads
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
LAYER_NORM_EPS = 1e-6
CPU_MATMUL_LENGTH = 1024  # beyond it the attention matrix costs more than it saves


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v for (B, heads, L, d), in the dtype of ``q``.

    SDPA, but for short sequences in half precision on CPU: there its backward pass is slow, and two
    batched matrix products are 14, 8 and 3 times faster for L = 9, 65 and 513 (forward and backward, torch 2.13).
    """
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-2] <= CPU_MATMUL_LENGTH:
        weight: Tensor = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1)
        return weight.to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Group(NamedTuple):
    """How one group of views lies in the flat token list: B samples of L tokens, prefix included."""

    samples: int
    length: int


class Attention(nn.Module):
    """Multi-head self-attention over flat tokens; each sample attends to itself."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        """Build the projections; channels of ``qkv`` are ordered (3, heads, head_dim)."""
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def split(self, qkv: Tensor, group: Group, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v (B, heads, L, d), rotated, as views of the flat ``qkv`` (B*L, 3E) of one group."""
        split = qkv.view(group.samples, group.length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if rotation is None:
            q, k, v = split.unbind(0)
            return q, k, v
        both, v = split.split([2, 1])  # not by index, whose gradient fills zeros of the size of all three
        q, k = rotate(both, rotation).unbind(0)
        return q, k, v[0]

    def forward(self, x: Tensor, groups: tuple[Group, ...], rotations: list[Rotation] | None) -> Tensor:
        """Return attended tokens (T, E) for flat tokens (T, E), T = sum of B_i * L_i."""
        qkv = self.qkv(x)
        parts = qkv.split([g.samples * g.length for g in groups]) if len(groups) > 1 else (qkv,)
        mixed = []
        for i, (part, group) in enumerate(zip(parts, groups, strict=True)):
            q, k, v = self.split(part, group, rotations[i] if rotations else None)
            mixed.append(attend(q, k, v).transpose(1, 2).reshape(part.shape[0], -1))
        out: Tensor = self.proj(torch.cat(mixed) if len(mixed) > 1 else mixed[0])
        return out


class Block(nn.Module):
    """A pre-LN transformer block on flat tokens, optionally with LayerScale."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: float, layer_scale: float | None) -> None:
        """Build attention and MLP; ``layer_scale`` is the initial gain of both branches, None = no gain."""
        super().__init__()
        hidden = int(embed_dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.fc1 = nn.Linear(embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, embed_dim)
        self.scale1 = nn.Parameter(torch.full((embed_dim,), layer_scale)) if layer_scale is not None else None
        self.scale2 = nn.Parameter(torch.full((embed_dim,), layer_scale)) if layer_scale is not None else None

    def forward(
        self, x: Tensor, groups: tuple[Group, ...], rotations: list[Rotation] | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """Return tokens (T, E) after both branches.

        Args:
            x: (T, E) residual stream.
            groups: how T splits into samples.
            rotations: per group, or None.
            keep: (T, 1) factor of both branches: 0 = the sample skips this block, else 1 / (1 - drop_prob).
        """
        branch = self.attn(self.norm1(x), groups, rotations)
        if self.scale1 is not None:
            branch = branch * self.scale1
        x = x + (branch if keep is None else branch * keep)
        branch = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        if self.scale2 is not None:
            branch = branch * self.scale2
        out: Tensor = x + (branch if keep is None else branch * keep)
        return out


class ViT(Backbone):
    """A plain ViT: patches as tokens, [CLS], learned mask token, fixed positions, pre-LN blocks, final LayerNorm.

    All groups of views are concatenated for LayerNorm and linear layers; attention runs per group with SDPA. The
    residual stream stays float32 under autocast; linear layers and attention run in the autocast dtype, each weight
    cast once per pass (Lightning's autocast keeps no cast weights between calls, so one pass for all groups also casts
    once instead of once per group). Positions are those within the view, not within the body.

    Initialisation is Xavier-uniform for every matrix, the patch embedding included: positions of scale 1 are then about
    as strong as the content, so that neither drowns the other.

    Source: plain ViT [R: iBOT] on 3D patches [R: UNETR, 3DINO]; fixed sin-cos positions and initialisation [R: MAE];
    grouped forward [R: DINOv3]; position scale ours. The abstract of AG-SSD names no encoder.

    Args:
        in_channels: C.
        patch_size: voxels per token, one number or ([D,] H, W).
        size: preset of ``embed_dim``, ``depth`` and ``num_heads``; each may be overridden.
        depth: number of blocks.
        embed_dim: E.
        num_heads: heads; must divide E.
        mlp_ratio: hidden width of the MLP over E.
        num_registers: extra learned tokens that are dropped at the end.
        layer_scale: initial LayerScale gain, None = without.
        drop_path: drop probability of the last block; rises linearly from 0 at the first. Acts only on views whose
            ``drop_noise`` is given, in train and eval mode alike.
        rotary: rotate queries and keys of patch tokens by their position. The additive position stays; switch it off
            with ``position_scale=0``.
        position_scale: factor of the additive position code. Much below 1 masked tokens do not find their neighbours,
            and reconstruction stays at predicting the mean for long (docs/evidence.md).
        position_grid: None computes the code for each grid. A size stores a table for that grid instead (a buffer,
            sin-cos at first, meant for weights trained elsewhere) and resamples it linearly for other grids.
        class_token: False leaves out [CLS]; ``Features.cls`` is then the mean token.
        spatial_dims: 3 for volumes (B, C, D, H, W), 2 for frames (B, C, H, W).
    """

    input_weight = "patch_weight"
    can_leave_out = True

    def __init__(
        self,
        in_channels: int = 1,
        patch_size: int | Size = 16,
        size: Literal["tiny", "small", "base", "large"] = "small",
        depth: int | None = None,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float = 4.0,
        num_registers: int = 0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        rotary: bool = False,
        position_scale: float = 1.0,
        position_grid: Size | None = None,
        class_token: bool = True,
        spatial_dims: int = 3,
    ) -> None:
        """Build the encoder; see the class for the arguments.

        Raises:
            ValueError: if a size is unknown or sizes do not fit each other.
        """
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"size {size!r} is unknown; use one of {', '.join(SIZES)}")
        self.embed_dim = SIZES[size][0] if embed_dim is None else embed_dim
        self.depth = SIZES[size][1] if depth is None else depth
        self.num_heads = SIZES[size][2] if num_heads is None else num_heads
        self.in_channels = in_channels
        if spatial_dims not in INTERPOLATION:
            raise ValueError(f"spatial_dims is {spatial_dims}; use 3 for volumes or 2 for frames")
        self.patch_size = (patch_size,) * spatial_dims if isinstance(patch_size, int) else tuple(patch_size)
        for name, given in (("patch_size", self.patch_size), ("position_grid", position_grid)):
            if given is not None and len(given) != spatial_dims:
                raise ValueError(
                    f"{name} is {tuple(given)}, but spatial_dims is {spatial_dims}; give {spatial_dims} numbers"
                )
        if min(self.embed_dim, self.depth, self.num_heads, in_channels, *self.patch_size) < 1:
            raise ValueError("embed_dim, depth, num_heads, in_channels and patch_size must be at least 1")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}")
        if rotary and (self.embed_dim // self.num_heads) % 2:
            raise ValueError(f"rotary needs an even head size, got {self.embed_dim // self.num_heads}")
        self.rotary = rotary
        self.position_scale = position_scale
        self.drop_probs = drop_probabilities(drop_path, self.depth)
        self.drop_prob_row: Tensor
        self.register_buffer("drop_prob_row", torch.tensor(self.drop_probs), persistent=False)
        self.level_blocks = tuple(i * self.depth // 4 for i in (1, 2, 3))
        self.level_channels = (self.embed_dim,) * 4
        self.level_strides = (self.patch_size,) * 4
        self.config = {
            "class_path": "agssd.models.vit.ViT",
            "init_args": {
                "in_channels": in_channels,
                "patch_size": list(self.patch_size),
                "size": size,
                "depth": self.depth,
                "embed_dim": self.embed_dim,
                "num_heads": self.num_heads,
                "mlp_ratio": mlp_ratio,
                "num_registers": num_registers,
                "layer_scale": layer_scale,
                "drop_path": drop_path,
                "rotary": rotary,
                "position_scale": position_scale,
                "position_grid": None if position_grid is None else list(position_grid),
                "class_token": class_token,
                "spatial_dims": spatial_dims,
            },
        }

        self.patch_weight = nn.Parameter(torch.empty(self.embed_dim, in_channels, *self.patch_size))
        self.patch_bias = nn.Parameter(torch.zeros(self.embed_dim))
        self.cls_token = nn.Parameter(torch.empty(1, self.embed_dim)) if class_token else None
        self.has_cls_attention = class_token
        self.registers = nn.Parameter(torch.empty(num_registers, self.embed_dim)) if num_registers else None
        self.mask_token = nn.Parameter(torch.empty(self.embed_dim))
        self.blocks = nn.ModuleList(
            Block(self.embed_dim, self.num_heads, mlp_ratio, layer_scale) for _ in range(self.depth)
        )
        self.norm = nn.LayerNorm(self.embed_dim, eps=LAYER_NORM_EPS)
        self.num_prefix = int(class_token) + num_registers
        self.position_grid: Size | None = None
        self.position_table: Tensor | None
        if position_grid is None:
            self.register_buffer("position_table", None)
        else:
            self.position_grid = tuple(position_grid)
            table = sincos_position(self.position_grid, self.embed_dim) * position_scale
            self.register_buffer("position_table", table.mT.unflatten(1, self.position_grid).clone())
        self._positions: dict[tuple[Size, torch.device], Tensor] = {}
        self._rotations: dict[tuple[Size, torch.device], Rotation] = {}
        self._initialise()

    def _initialise(self) -> None:
        nn.init.xavier_uniform_(self.patch_weight.data.view(self.embed_dim, -1))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.registers, self.mask_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Return names of the learned tokens and gains."""
        names = {"cls_token", "registers", "mask_token", "patch_bias"}
        return {n for n, _ in self.named_parameters() if n in names or n.endswith((".scale1", ".scale2"))}

    def layer_index(self, name: str) -> int:
        """Return 0 for embedding and tokens, 1 .. depth for blocks, depth + 1 for the final norm."""
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return self.depth + 1 if name.startswith("norm.") else 0

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile each block in place with static shapes; parameter names and the state dict stay as they are.

        Args:
            backend: of ``torch.compile``; all blocks share one compiled graph per set of group shapes.
        """
        for block in self.blocks:
            block.compile(dynamic=False, fullgraph=True, backend=backend)

    def shardable_parts(self) -> list[nn.Module]:
        """Return every block but the last, whose queries and keys the attention of [CLS] reads."""
        return list(self.blocks[:-1])

    def position(self, grid: Size) -> Tensor:
        """Return the additive position code (N, E) float32 of a token grid, scaled, on the device of the weights."""
        device = self.mask_token.device
        if self.position_table is not None:
            table = self.position_table
            if grid != self.position_grid:
                mode = INTERPOLATION[self.spatial_dims]
                table = F.interpolate(table[None].float(), size=grid, mode=mode, align_corners=False)[0]
            return rearrange(table, "e ... -> (...) e")
        if (grid, device) not in self._positions:
            with torch.inference_mode(False):  # the cache outlives the context it was filled in
                self._positions[grid, device] = sincos_position(grid, self.embed_dim, device) * self.position_scale
        return self._positions[grid, device]

    def _rotation(self, grid: Size) -> Rotation:
        key = (grid, self.mask_token.device)
        if key not in self._rotations:
            with torch.inference_mode(False):
                angle = rotary_angles(grid, self.embed_dim // self.num_heads, key[1])
                angle = F.pad(angle, (0, 0, self.num_prefix, 0)).repeat(1, 2)  # prefix tokens have no place
                self._rotations[key] = (angle.cos(), angle.sin())
        return self._rotations[key]

    def _patchify(self, x: Tensor) -> Tensor:
        cells, within, whole = axis_names(self.spatial_dims)
        return rearrange(x, f"b c {whole} -> (b {cells}) (c {within})", **sizes_of(within, self.patch_size))

    def _embed(self, views: list[Tensor], masks: list[Tensor | None]) -> tuple[Tensor, tuple[Group, ...], list[Size]]:
        """Return flat tokens (T, E), their groups and their grids, after masking and positions."""
        grids = [self.check_input(view) for view in views]
        for view, mask, grid in zip(views, masks, grids, strict=True):
            if mask is not None:
                self.check_mask(mask, view.shape[0], grid)
        patches = [self._patchify(view) for view in views]
        flat = torch.cat(patches) if len(patches) > 1 else patches[0]
        embedded = F.linear(flat, self.patch_weight.flatten(1), self.patch_bias)
        prefix = [token for token in (self.cls_token, self.registers) if token is not None]
        parts, groups = [], []
        pieces = torch.split(embedded, [len(p) for p in patches])
        for view, piece, mask, grid in zip(views, pieces, masks, grids, strict=True):
            count, position = view.shape[0], self.position(grid).to(self.mask_token.dtype)
            tokens = piece.view(count, -1, self.embed_dim)
            if mask is None:
                position = position + 0 * self.mask_token  # keeps every parameter in the graph, as DDP needs
            else:
                tokens = torch.where(mask.flatten(1)[:, :, None], self.mask_token, tokens)
            tokens = torch.cat([*(p.expand(count, -1, -1) for p in prefix), tokens + position], dim=1)
            groups.append(Group(count, tokens.shape[1]))
            parts.append(tokens.flatten(0, 1))
        return torch.cat(parts) if len(parts) > 1 else parts[0], tuple(groups), grids

    def _keep_factors(self, noise: list[Tensor | None], groups: tuple[Group, ...], like: Tensor) -> Tensor | None:
        """Return (depth, T, 1) branch factors, or None if nothing can drop."""
        if self.drop_probs[-1] == 0.0 or all(n is None for n in noise):
            return None
        prob = self.drop_prob_row.float()
        factors = []
        for uniform, group in zip(noise, groups, strict=True):
            if uniform is None:
                factors.append(like.new_ones(group.samples * group.length, self.depth, dtype=torch.float32))
                continue
            self.check_drop_noise(uniform, group.samples)
            factor = (uniform >= prob).float() / (1 - prob)
            factors.append(factor.repeat_interleave(group.length, dim=0))
        return torch.cat(factors).t().unsqueeze(-1).contiguous()

    def _cls_rows(
        self, x: Tensor, groups: tuple[Group, ...], grids: list[Size], rotations: list[Rotation] | None
    ) -> list[Tensor]:
        """Return per group the [CLS] row of the last block's attention for its input ``x`` (T, E)."""
        block = self.blocks[-1]
        assert isinstance(block, Block)
        qkv = block.attn.qkv(block.norm1(x))
        rows = []
        for i, part in enumerate(torch.split(qkv, [g.samples * g.length for g in groups])):
            q, k, _ = block.attn.split(part, groups[i], rotations[i] if rotations else None)
            logits = (q[:, :, :1].float() * k.float()).sum(-1) * q.shape[-1] ** -0.5  # no matmul: autocast would round
            row = logits.softmax(-1)[..., self.num_prefix :]
            rows.append(row.unflatten(-1, grids[i]))
        return rows

    def _blocks(
        self,
        views: list[Tensor],
        masks: list[Tensor | None] | None,
        noise: list[Tensor | None] | None,
        keep_states: tuple[int, ...] = (),
    ) -> tuple[list[Tensor], list[list[Tensor]], list[Size]]:
        """Return per group the normed tokens (B, L, E), the wanted hidden states (B, L, E), and the grids."""
        empty: list[Tensor | None] = [None] * len(views)
        x, groups, grids = self._embed(views, empty if masks is None else masks)
        rotations = [self._rotation(grid) for grid in grids] if self.rotary else None
        keep = self._keep_factors(empty if noise is None else noise, groups, x)
        normed, states = self._run(x, groups, grids, rotations, keep, keep_states)
        return normed, states, grids

    def _run(
        self,
        x: Tensor,
        groups: tuple[Group, ...],
        grids: list[Size] | None,
        rotations: list[Rotation] | None,
        keep: Tensor | None,
        keep_states: tuple[int, ...],
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Return per group the normed tokens (B, L, E) and the wanted hidden states, from embedded tokens (T, E).

        Without ``grids``, where tokens are left out, no attention of [CLS] is recorded.
        """
        states = []
        for i, block in enumerate(self.blocks):
            last = i == self.depth - 1
            if self.record_cls_attention and last and grids is not None:
                with torch.no_grad():
                    self.last_cls_attention = self._cls_rows(x, groups, grids, rotations)
            x = block(x, groups, rotations, None if keep is None else keep[i])
            if i in keep_states:
                states.append(x)

        def per_group(flat: Tensor) -> list[Tensor]:
            parts = torch.split(flat, [g.samples * g.length for g in groups])
            return [part.view(g.samples, g.length, -1) for part, g in zip(parts, groups, strict=True)]

        return per_group(self.norm(x)), [per_group(state) for state in states]

    def _features(self, tokens: Tensor, grid: Size, levels: list[Tensor]) -> Features:
        patches = tokens[:, self.num_prefix :]
        return Features(patches.mean(1) if self.cls_token is None else tokens[:, 0], patches, grid, levels)

    def forward(self, x: Tensor, drop_noise: Tensor | None = None) -> Features:
        """Return features of unmasked volumes.

        ``levels`` are four maps (B, E, *grid): the residual stream after blocks ``i * depth // 4`` (counted from
        0) for i = 1, 2, 3, not normed, and the normed output. At depth 12 these are the blocks 3, 6 and 9 that MONAI's
        UNETR decodes.

        Args:
            x: (B, C, [D,] H, W) in the model's intensity range.
            drop_noise: (B, depth) uniforms in [0, 1), or None, as for :meth:`forward_views`.

        Raises:
            ValueError: if channels or shape do not fit.
        """
        normed, states, grids = self._blocks([x], None, [drop_noise], tuple(set(self.level_blocks)))
        by_block = dict(zip(sorted(set(self.level_blocks)), states, strict=True))
        maps = [by_block[i][0] for i in self.level_blocks] + normed
        levels = [m[:, self.num_prefix :].mT.unflatten(2, grids[0]) for m in maps]
        return self._features(normed[0], grids[0], levels)

    def hidden_states(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return normed patch tokens (B, N, E) and the residual stream (B, N, E) after every block, not normed."""
        normed, states, _ = self._blocks([x], None, None, tuple(range(self.depth)))
        return normed[0][:, self.num_prefix :], [state[0][:, self.num_prefix :] for state in states]

    def forward_views(
        self,
        views: list[Tensor],
        masks: list[Tensor | None] | None = None,
        drop_noise: list[Tensor | None] | None = None,
    ) -> list[Features]:
        """Return features of groups of views in one pass over the linear layers; ``levels`` stay empty.

        Sample b skips block l iff ``drop_noise[i][b, l] < drop_probs[l]``; kept samples are scaled by
        ``1 / (1 - drop_probs[l])``. Nothing is drawn here, so results do not depend on how a batch is cut.

        Args:
            views: groups (B_i, C, [D_i,] H_i, W_i).
            masks: per group (B_i, *grid) bool, True = embedding replaced by the mask token; or None.
            drop_noise: per group (B_i, depth) uniforms in [0, 1), or None.

        Raises:
            ValueError: if a shape does not fit.
        """
        self.check_groups(views, masks=masks, drop_noise=drop_noise)
        if not views:
            return []
        normed, _, grids = self._blocks(views, masks, drop_noise)
        return [self._features(tokens, grid, []) for tokens, grid in zip(normed, grids, strict=True)]

    def forward_visible(self, x: Tensor, visible: Tensor, drop_noise: Tensor | None = None) -> Features:
        """Return features (B, M, E) of the patches at positions ``visible`` (B, M), which alone are embedded.

        Their positions, additive and rotary, are those they have in the whole view.

        Source: the asymmetric encoder of MAE [R: MAE].

        Args:
            x: (B, C, [D,] H, W).
            visible: (B, M) int64.
            drop_noise: (B, depth) uniforms in [0, 1), or None.

        Raises:
            ValueError: if a shape does not fit.
        """
        grid = self.check_input(x)
        count = x.shape[0]
        if visible.ndim != 2 or visible.shape[0] != count:
            raise ValueError(f"visible has shape {tuple(visible.shape)}; expected (B, M) with B = {count}")
        patches = self._patchify(x).unflatten(0, (count, -1))
        patches = patches.gather(1, visible[..., None].expand(-1, -1, patches.shape[-1]))
        embedded = F.linear(patches, self.patch_weight.flatten(1), self.patch_bias)
        prefix = [token.expand(count, -1, -1) for token in (self.cls_token, self.registers) if token is not None]
        tokens = torch.cat([*prefix, embedded + self.position(grid).to(self.mask_token.dtype)[visible]], dim=1)
        groups = (Group(count, tokens.shape[1]),)
        rotations: list[Rotation] | None = None
        if self.rotary:
            ahead = torch.arange(self.num_prefix, device=x.device).expand(count, -1)
            places = torch.cat([ahead, visible + self.num_prefix], 1)
            cos, sin = (part[places][:, None] for part in self._rotation(grid))  # (B, 1, L, d)
            rotations = [(cos, sin)]
        flat = tokens.flatten(0, 1)
        keep = self._keep_factors([drop_noise], groups, flat)
        normed, _ = self._run(flat, groups, None, rotations, keep, ())
        return self._features(normed[0], grid, [])

    def freeze_mask_token(self) -> None:
        """Stop training the token that replaces hidden patches."""
        self.mask_token.requires_grad_(False)

    def freeze_patch_embedding(self) -> None:
        """Stop training the projection of patches, weight and bias."""
        self.patch_weight.requires_grad_(False)
        self.patch_bias.requires_grad_(False)

    def cls_attention(self, x: Tensor) -> Tensor:
        """Return attention of [CLS] to each patch in the last block, (B, heads, *grid) float32.

        Only that row is computed, from the block's own queries and keys; SDPA stays on everywhere. Rows sum to less
        than 1: the rest goes to [CLS] itself and to registers. For the views of a step already being computed, set
        ``record_cls_attention`` and read ``last_cls_attention`` instead of calling this.

        Raises:
            ValueError: if the encoder has no [CLS] or ``x`` does not fit.
        """
        if not self.has_cls_attention:
            raise ValueError(self._no_cls())
        tokens, groups, grids = self._embed([x], [None])
        rotations = [self._rotation(grids[0])] if self.rotary else None
        for block in self.blocks[:-1]:
            tokens = block(tokens, groups, rotations)
        return self._cls_rows(tokens, groups, grids, rotations)[0]
