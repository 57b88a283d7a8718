"""Weights of vision transformers trained on pictures, in the names of timm and of their authors, as our 2D ViT.

Read are plain ViTs: DeiT, DINO, iBOT, MAE, DINOv2 with or without registers. No code of theirs is needed, only the
state dict; nothing is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from agssd.models.vit import ViT

_BLOCK = {  # ours -> theirs
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attn.qkv.weight": "attn.qkv.weight",
    "attn.qkv.bias": "attn.qkv.bias",
    "attn.proj.weight": "attn.proj.weight",
    "attn.proj.bias": "attn.proj.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "fc1.weight": "mlp.fc1.weight",
    "fc1.bias": "mlp.fc1.bias",
    "fc2.weight": "mlp.fc2.weight",
    "fc2.bias": "mlp.fc2.bias",
}
_SCALES = {"scale1": "ls1.gamma", "scale2": "ls2.gamma"}
_IGNORED = re.compile(r"^(head|fc_norm|decoder|pre_logits)|^mask_token$")  # no part of the encoder, or trained anew


def from_pictures(state: Mapping[str, Tensor], num_heads: int, in_channels: int = 3) -> ViT:
    """Return our 2D ViT with the weights of a ViT trained on pictures.

    Its tokens are those of the source up to rounding, on the grid that the source was trained on; on others positions
    are resampled linearly, where most sources do so cubically. With ``in_channels=1`` the kernels of the colours are
    added, so that a grey picture gives what it gave three times over. Inputs are to be scaled as the source wants them.

    Args:
        state: tensors by name; classifiers, decoders and the mask token are left out.
        num_heads: not visible in the weights; 3 for tiny, 6 for small, 12 for base, 16 for large.
        in_channels: 3, or 1 for grey.

    Raises:
        ValueError: if a tensor is missing or has no place, positions lie on no square, or the channels are others.
    """
    theirs = {name: value for name, value in state.items() if not _IGNORED.match(name)}

    def take(name: str) -> Tensor:
        if name not in theirs:
            raise ValueError(f"{name} is missing among the weights; give the state dict of a plain ViT for pictures")
        return theirs.pop(name)

    kernel, table = take("patch_embed.proj.weight"), take("pos_embed")[0]
    if kernel.ndim != 4 or in_channels not in (1, kernel.shape[1]):
        raise ValueError(
            f"the patch embedding has shape {tuple(kernel.shape)} and in_channels is {in_channels}; give 1, or as many "
            "as the weights have"
        )
    if in_channels == 1:
        kernel = kernel.sum(1, keepdim=True)
    registers = next((theirs.pop(name)[0] for name in ("register_tokens", "reg_token") if name in theirs), None)
    cls = take("cls_token")[0]
    side = round(len(table) ** 0.5)
    if side**2 == len(table) - 1:  # the first position is that of [CLS]
        cls, table = cls + table[:1], table[1:]
    elif side**2 != len(table):
        raise ValueError(f"pos_embed has {len(table)} positions, which are no square, with or without one for [CLS]")
    depth = len({name.split(".")[1] for name in theirs if name.startswith("blocks.")})
    hidden = len(theirs.get("blocks.0.mlp.fc1.weight", kernel))
    scaled = f"blocks.0.{_SCALES['scale1']}" in theirs
    model = ViT(
        in_channels=in_channels,
        patch_size=(kernel.shape[2], kernel.shape[3]),
        embed_dim=len(kernel),
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=hidden / len(kernel),
        num_registers=0 if registers is None else len(registers),
        layer_scale=1.0 if scaled else None,
        position_grid=(side, side),
        spatial_dims=2,
    )
    ours = {
        "patch_weight": kernel,
        "patch_bias": take("patch_embed.proj.bias"),
        "cls_token": cls,
        "position_table": table.mT.unflatten(1, (side, side)),
        "norm.weight": take("norm.weight"),
        "norm.bias": take("norm.bias"),
        "mask_token": model.mask_token.detach(),
    }
    if registers is not None:
        ours["registers"] = registers
    for block in range(depth):
        for name, their in (_BLOCK | (_SCALES if scaled else {})).items():
            ours[f"blocks.{block}.{name}"] = take(f"blocks.{block}.{their}")
    if theirs:
        raise ValueError(f"weights with no place in our ViT: {sorted(theirs)[:6]}; it is no plain ViT")
    model.load_state_dict(ours)
    return model.eval()
