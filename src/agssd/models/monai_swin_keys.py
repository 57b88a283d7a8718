"""Weights of MONAI's SwinUNETR in our encoder, and back.

The modules are MONAI's own, so names and values are equal below a prefix. What differs between files is handled here:
the prefix (``module.`` in the released ``model_swinvit.pt``, ``swinViT.`` in a whole SwinUNETR, both in what users
trained in parallel), the layer of a wrapper that the tensors lie in (``state_dict``, ``model``, ...), and the MLP's old
names ``fc1`` and ``fc2``. What no weight tells, the way cells are joined, must be named.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agssd.models.swin_unetr import Downsample, SwinUNETREncoder
from agssd.types import Size

PATCH = "patch_embed.proj.weight"
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "network_weights", "model", "net")
OLD_NAMES = {".mlp.fc1.": ".mlp.linear1.", ".mlp.fc2.": ".mlp.linear2."}
ENCODER = re.compile(r"(patch_embed|layers[1-4]c?)\.")  # the rest of a network: decoder, heads, a final norm


def read_monai_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a MONAI checkpoint by name, read as data alone.

    Args:
        path: file written by ``torch.save``: a state dict, or a dict that holds one under a usual name.

    Raises:
        ValueError: if it cannot be read without running code from it, or holds no tensors.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: holds more than tensors and plain values, or is no checkpoint; where you trust it, load it with "
            'torch.load(path, weights_only=False) and save what is under "state_dict" to a new file'
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a checkpoint ({type(error).__name__}); is it whole?") from None
    for _ in WRAPPERS:
        inner = next((content[name] for name in WRAPPERS if isinstance(content, Mapping) and name in content), None)
        if not isinstance(inner, Mapping):
            break
        content = inner
    tensors = {n: v for n, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise ValueError(f"{path}: holds no tensors, neither at its top nor under {', '.join(WRAPPERS)}")
    return tensors


def from_monai_swin(
    state: Mapping[str, Tensor], *, downsample: Downsample, window_size: Size | None = None
) -> SwinUNETREncoder:
    """Return our encoder with the weights of a MONAI SwinUNETR, of its ``swinViT``, or of a released SSL checkpoint.

    Axes of space, sizes, stages, heads and version 1 or 2 are read from the shapes. The mask token, which MONAI lacks,
    is fresh.

    Args:
        state: tensors by name, see :func:`read_monai_weights`; decoder and heads are left out.
        downsample: how the network that the weights come from joins cells, which no weight tells. "mergingv2" where it
            was built with ``downsample="mergingv2"``; else "merging" if it was trained under MONAI 1.5 or newer, and
            "merging_1.4" under older ones, as the files released with SwinUNETR and VoCo were.
        window_size: cells of a window per axis; None = a cube, of frames a square.

    Raises:
        ValueError: if weights are missing, unknown or of other shapes; the message names them.
    """
    own = _encoder_part(state)
    depths = _depths(own)
    tables = [f"layers{stage}.0.blocks.0.attn.relative_position_bias_table" for stage in range(1, len(depths) + 1)]
    mlp = "layers1.0.blocks.0.mlp.linear1.weight"
    missing = [name for name in (*tables, mlp) if name not in own]
    if missing:
        raise ValueError(f"{missing[0]} is missing among the MONAI weights")
    patch = own[PATCH]
    dims = patch.ndim - 2
    if dims not in (2, 3):
        raise ValueError(f"the patch embedding has shape {tuple(patch.shape)}; only 2D and 3D networks can be read")
    if window_size is None:
        window_size = ((round(len(own[tables[0]]) ** (1 / dims)) + 1) // 2,) * dims
    if torch.Size(2 * n - 1 for n in window_size).numel() != len(own[tables[0]]):
        raise ValueError(
            f"the position table has {len(own[tables[0]])} rows, which is no {window_size}; pass window_size="
        )
    model = SwinUNETREncoder(
        in_channels=patch.shape[1],
        feature_size=patch.shape[0],
        patch_embed_stride=tuple(patch.shape[2:]),
        depths=depths,
        num_heads=tuple(own[name].shape[1] for name in tables),
        window_size=window_size,
        mlp_ratio=len(own[mlp]) / patch.shape[0],
        use_v2=any(name.startswith("layers1c.") for name in own),
        downsample=downsample,
        spatial_dims=dims,
    )
    target = model.swinViT.state_dict()
    own |= {name: value for name, value in target.items() if name.endswith("relative_position_index")}
    _check_fit(own, target, "the MONAI weights", "our encoder")
    model.swinViT.load_state_dict(own)
    return model.eval()


def to_monai_swin(backbone: SwinUNETREncoder) -> dict[str, Tensor]:
    """Return the state dict of a MONAI ``SwinTransformer`` with the weights of ``backbone``; the mask token stays out.

    For the ``swinViT`` of a SwinUNETR; see :func:`load_into_monai_swin`, which also checks what no weight tells.
    """
    return {name: value.detach().clone() for name, value in backbone.swinViT.state_dict().items()}


def load_into_monai_swin(backbone: SwinUNETREncoder, network: nn.Module) -> None:
    """Write our weights into a MONAI ``SwinUNETR`` or ``SwinTransformer``, strictly; a decoder keeps its weights.

    Args:
        backbone: our encoder.
        network: MONAI network of the same sizes and the same way of joining cells.

    Raises:
        ValueError: if stages, shapes or the way of joining cells differ; the message names them.
    """
    swin: Any = network.get_submodule("swinViT") if hasattr(network, "swinViT") else network
    target = swin.state_dict()
    if PATCH not in target:
        raise ValueError(f"{type(network).__name__} has no {PATCH}; give a MONAI SwinUNETR or SwinTransformer")
    state = to_monai_swin(backbone)
    _check_fit(state, target, "our weights", f"the MONAI {type(network).__name__}")
    if _joining_order(swin, backbone.spatial_dims) != backbone.merging:
        raise ValueError(
            f"the backbone joins cells by downsample={backbone.downsample!r} and the MONAI network in another order; "
            f"build the network with downsample={backbone.downsample!r}, or where this MONAI has none such, set "
            "`network.swinViT = MonaiSwinEncoder(backbone)`"
        )
    swin.load_state_dict(state)


def _encoder_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the Swin transformer without their prefix, under MONAI's present names."""
    prefixes = {name.removesuffix(PATCH) for name in state if name.endswith(PATCH)}
    if len(prefixes) != 1:
        raise ValueError(
            f"{len(prefixes)} weights named ...{PATCH}; give the state dict of one MONAI SwinUNETR, of its swinViT, or "
            "of a released checkpoint"
        )
    (prefix,) = prefixes
    own = {}
    for name, value in state.items():
        inner = name.removeprefix(prefix)
        if not name.startswith(prefix) or not ENCODER.match(inner):
            continue
        for old, new in OLD_NAMES.items():
            inner = inner.replace(old, new)
        own[inner] = value
    return own


def _depths(own: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the number of blocks of each stage that has any."""
    blocks = {match.groups() for match in (re.match(r"layers(\d)\.0\.blocks\.(\d+)\.", name) for name in own) if match}
    counts = [sum(stage == str(wanted) for stage, _ in blocks) for wanted in range(1, 5)]
    present = tuple(count for count in counts if count)
    if not present or counts[: len(present)] != list(present):
        raise ValueError(f"the weights hold {counts} blocks in stages 1 to 4; a SwinUNETR has none missing in between")
    return present


def _joining_order(swin: Any, dims: int) -> tuple[int, ...]:
    """Return the order in which a MONAI network joins the cells of a block, by letting it join numbered ones."""
    merging = type(swin.layers1[0].downsample)(1)
    merging.norm = merging.reduction = nn.Identity()
    return tuple(int(n) for n in merging(torch.arange(2.0**dims).view(1, *[2] * dims, 1)).flatten())


def _check_fit(state: Mapping[str, Tensor], target: Mapping[str, Tensor], source: str, place: str) -> None:
    missing, foreign = sorted(target.keys() - state.keys()), sorted(state.keys() - target.keys())
    unequal = [
        f"{n}: {tuple(state[n].shape)} for {tuple(target[n].shape)}"
        for n in sorted(state.keys() & target.keys())
        if state[n].shape != target[n].shape
    ]
    if missing or foreign or unequal:
        raise ValueError(
            f"{source} do not fit {place}: without source {missing[:4]}, without place {foreign[:4]}, of other shape "
            f"{unequal[:4]}"
        )


class MonaiSwinEncoder(nn.Module):
    """Our encoder behind the interface of MONAI's ``SwinTransformer``.

    ``network.swinViT = MonaiSwinEncoder(backbone)`` puts it into a SwinUNETR. Features are the backbone's own, however
    it joins cells. SwinUNETR's decoder takes an encoder of four stages.
    """

    def __init__(self, backbone: SwinUNETREncoder) -> None:
        """Wrap ``backbone``; its parameters stay shared."""
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor, normalize: bool = True) -> list[Tensor]:
        """Return the maps (B, E_i, [D_i,] H_i, W_i) after the embedding and after each stage.

        Args:
            x: (B, C, [D,] H, W).
            normalize: whether they are normed.
        """
        return self.backbone.hidden_states(x, normalize)
