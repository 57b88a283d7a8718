"""Weights of our ViT in MONAI's ViT and UNETR, and back.

MONAI differs in five points, each handled or refused here: it keeps a learnable position table for one grid (our code
for that grid is written into it); it has no LayerScale (the gains are folded into the preceding linear layers, which is
exact); its LayerNorm uses eps 1e-5 (``load_into_monai`` sets ours, because eps is not in a state dict); its ViT has
neither registers nor rotary positions (refused); its UNETR has no [CLS] (refused unless ``drop_cls``, because patches
attend to [CLS] and features change; ``MonaiEncoder`` keeps it and changes nothing).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from agssd.models.vit import LAYER_NORM_EPS, ViT
from agssd.types import Size

BLOCK_KEYS = {  # ours -> MONAI's, behind "blocks.<i>."
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attn.qkv.weight": "attn.qkv.weight",
    "attn.qkv.bias": "attn.qkv.bias",
    "attn.proj.weight": "attn.out_proj.weight",
    "attn.proj.bias": "attn.out_proj.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "fc1.weight": "mlp.linear1.weight",
    "fc1.bias": "mlp.linear1.bias",
    "fc2.weight": "mlp.linear2.weight",
    "fc2.bias": "mlp.linear2.bias",
}
FOLDED = {"attn.proj": "scale1", "fc2": "scale2"}  # linear layer -> LayerScale gain behind it
PATCH = "patch_embedding.patch_embeddings"
POSITION = "patch_embedding.position_embeddings"


def to_monai(backbone: ViT, grid: Size, *, class_token: bool, drop_cls: bool = False) -> dict[str, Tensor]:
    """Return the state dict of a MONAI ViT (``proj_type="conv"``, ``qkv_bias=True``) with the weights of ``backbone``.

    Args:
        backbone: our encoder.
        grid: token grid ([D',] H', W') of the MONAI network: its ``img_size`` divided by the patch.
        class_token: True for a MONAI ViT with ``classification=True`` (its head is not part of the result), False for
            one without and for ``UNETR.vit``.
        drop_cls: leave out a [CLS] that the target has no place for. The patches then no longer attend to it, so
            features are close, not equal.

    Raises:
        ValueError: if ``backbone`` has parts that MONAI's ViT lacks, or a [CLS] too many or too few.
    """
    if backbone.registers is not None:
        raise ValueError("MONAI's ViT has no registers; export a backbone with num_registers=0 or use MonaiEncoder")
    if backbone.rotary:
        raise ValueError("MONAI's ViT has no rotary positions; export one with rotary=False or use MonaiEncoder")
    if class_token and backbone.cls_token is None:
        raise ValueError("the backbone has no [CLS] (class_token=False); build MONAI's ViT with classification=False")
    if not class_token and backbone.cls_token is not None and not drop_cls:
        raise ValueError(
            "the target has no place for [CLS] (MONAI's UNETR never has): pass drop_cls=True to lose it and change "
            "features slightly, or set `unetr.vit = MonaiEncoder(backbone)`, which keeps features equal"
        )
    state = {name: value.detach() for name, value in backbone.state_dict().items()}
    out = {
        f"{PATCH}.weight": state["patch_weight"],
        f"{PATCH}.bias": state["patch_bias"],
        POSITION: backbone.position(grid)[None],
        "norm.weight": state["norm.weight"],
        "norm.bias": state["norm.bias"],
    }
    if class_token:
        out["cls_token"] = state["cls_token"][None]
    for i in range(backbone.depth):
        for ours, theirs in BLOCK_KEYS.items():
            value = state[f"blocks.{i}.{ours}"]
            layer, kind = ours.rsplit(".", 1)
            gain = state.get(f"blocks.{i}.{FOLDED[layer]}") if layer in FOLDED else None
            if gain is not None:
                value = value * (gain[:, None] if kind == "weight" else gain)
            out[f"blocks.{i}.{theirs}"] = value
        # MONAI creates this LayerNorm in every block and uses it for cross-attention only
        out[f"blocks.{i}.norm_cross_attn.weight"] = torch.ones_like(state["norm.weight"])
        out[f"blocks.{i}.norm_cross_attn.bias"] = torch.zeros_like(state["norm.bias"])
    return {name: value.clone() for name, value in out.items()}


def load_into_monai(backbone: ViT, network: nn.Module, *, drop_cls: bool = False) -> None:
    """Write our weights into a MONAI ``ViT`` or into the ``vit`` of a MONAI ``UNETR``, strictly.

    Also sets the eps of its LayerNorms to ours. A classification head keeps its weights.

    Args:
        backbone: our encoder.
        network: MONAI network of the same sizes, built with ``qkv_bias=True`` and ``proj_type="conv"``.
        drop_cls: see ``to_monai``.

    Raises:
        ValueError: if parts or shapes do not fit; the message names them.
    """
    vit = network.get_submodule("vit") if hasattr(network, "vit") else network
    target = vit.state_dict()
    if POSITION not in target:
        raise ValueError(f"{type(network).__name__} has no {POSITION}; give a MONAI ViT or UNETR")
    if f"{PATCH}.weight" not in target:
        raise ValueError('the network embeds patches by a perceptron; build it with proj_type="conv"')
    count = target[POSITION].shape[1]
    image = getattr(network, "feat_size", None)
    state = to_monai(backbone, _grid_of(count, image, backbone), class_token="cls_token" in target, drop_cls=drop_cls)
    state.update({name: value for name, value in target.items() if name.startswith("classification_head.")})
    missing, foreign = sorted(target.keys() - state.keys()), sorted(state.keys() - target.keys())
    unequal = [
        f"{n}: ours {tuple(state[n].shape)}, MONAI {tuple(target[n].shape)}"
        for n in sorted(state.keys() & target.keys())
        if state[n].shape != target[n].shape
    ]
    if missing or foreign or unequal:
        hint = "; build it with qkv_bias=True" if any(n.endswith("qkv.bias") for n in foreign) else ""
        raise ValueError(
            f"weights do not fit the MONAI network{hint}: without source {missing[:4]}, without place {foreign[:4]}, "
            f"of other shape {unequal[:4]}"
        )
    vit.load_state_dict(state)
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = LAYER_NORM_EPS


def _grid_of(count: int, feat_size: object, backbone: ViT) -> Size:
    """Return the token grid of a MONAI network: its ``feat_size`` (UNETR), the stored table's, or a cube or square."""
    if isinstance(feat_size, tuple | list) and len(feat_size) == backbone.spatial_dims:
        return tuple(int(s) for s in feat_size)
    if backbone.position_grid is not None and count == torch.Size(backbone.position_grid).numel():
        return backbone.position_grid
    grid = _equal_edges(count, backbone.spatial_dims)
    if torch.Size(grid).numel() != count:
        raise ValueError(
            f"cannot tell the token grid from {count} tokens; call to_monai(backbone, grid=...) and load_state_dict"
        )
    return grid


def _equal_edges(count: int, dims: int) -> Size:
    """Return the grid of equal edges that has about ``count`` tokens."""
    return (round(count ** (1 / dims)),) * dims


def from_monai(state: Mapping[str, Tensor], num_heads: int, grid: Size | None = None) -> ViT:
    """Return our ViT with the weights of a MONAI ViT or UNETR; its outputs equal MONAI's up to LayerNorm's eps.

    The position table is kept as such (``position_grid``) and resampled for other grids. Parts that are no encoder
    (UNETR's decoder, a classification head) are left out; the mask token, which MONAI lacks, is fresh.

    Args:
        state: state dict of a MONAI ``ViT`` or ``UNETR`` (keys behind ``vit.`` are used if there are any).
        num_heads: not visible in the weights.
        grid: token grid of the position table; None = a cube, or a square.

    Raises:
        ValueError: if keys are missing or unknown, or the table does not fit ``grid``.
    """
    if any(name.startswith("vit.") for name in state):
        state = {name[len("vit.") :]: value for name, value in state.items() if name.startswith("vit.")}
    if POSITION not in state:
        raise ValueError(f"no {POSITION} among the weights; give the state dict of a MONAI ViT or UNETR")
    if f"{PATCH}.weight" not in state:
        raise ValueError('the weights embed patches by a perceptron; only proj_type="conv" tells the patch size')
    weight, table = state[f"{PATCH}.weight"], state[POSITION][0]
    if weight.ndim not in (4, 5):
        raise ValueError(f"the patch embedding has shape {tuple(weight.shape)}; only 2D and 3D networks can be read")
    embed_dim, in_channels, *patch_size = weight.shape
    if grid is None:
        grid = _equal_edges(len(table), len(patch_size))
    if torch.Size(grid).numel() != len(table):
        raise ValueError(f"the position table has {len(table)} tokens, which is not the grid {grid}; pass grid=")
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    hidden = len(state["blocks.0.mlp.linear1.weight"])
    model = ViT(
        in_channels=in_channels,
        patch_size=tuple(patch_size),
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=hidden / embed_dim,
        position_grid=grid,
        class_token="cls_token" in state,
        spatial_dims=len(patch_size),
    )
    ours = {
        "patch_weight": weight,
        "patch_bias": state[f"{PATCH}.bias"],
        "position_table": table.mT.unflatten(1, grid),
        "norm.weight": state["norm.weight"],
        "norm.bias": state["norm.bias"],
        "mask_token": model.mask_token.detach(),
    }
    if "cls_token" in state:
        ours["cls_token"] = state["cls_token"][0]
    for i in range(depth):
        for name, theirs in BLOCK_KEYS.items():
            value = state.get(f"blocks.{i}.{theirs}")
            if value is None and theirs != "attn.qkv.bias":
                raise ValueError(f"blocks.{i}.{theirs} is missing among the MONAI weights")
            ours[f"blocks.{i}.{name}"] = torch.zeros(3 * embed_dim) if value is None else value  # qkv_bias=False
    known = {f"blocks.{i}.{theirs}" for i in range(depth) for theirs in BLOCK_KEYS.values()}
    known |= {f"{PATCH}.weight", f"{PATCH}.bias", POSITION, "norm.weight", "norm.bias", "cls_token"}
    unknown = [
        n for n in state if n not in known and "cross_attn" not in n and not n.startswith("classification_head.")
    ]
    if unknown:
        raise ValueError(f"MONAI weights with no place in our ViT: {unknown[:6]}")
    model.load_state_dict(ours)
    return model


class MonaiEncoder(nn.Module):
    """Our ViT behind the interface of ``monai.networks.nets.ViT``: ``unetr.vit = MonaiEncoder(backbone)``.

    Keeps [CLS], registers, rotary positions and the position code of any grid inside, and shows MONAI's decoder patch
    tokens only, so the features are the backbone's own.
    """

    def __init__(self, backbone: ViT) -> None:
        """Wrap ``backbone``; its parameters stay shared."""
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return normed patch tokens (B, N, E) and the hidden states of all blocks (B, N, E).

        Args:
            x: (B, C, [D,] H, W).
        """
        return self.backbone.hidden_states(x)
