"""Segment Anything as transformers builds it: loading from a folder, and frames in its input size.

Source: Kirillov et al. 2023 (SAM), through ``transformers.SamModel``. Resizing and normalising are our own few lines,
so that torchvision is not needed.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# of the pictures that SAM was trained on, red, green, blue, in [0, 1]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WEIGHTS = "model.safetensors"


def load_sam(folder: str | Path) -> Any:
    """Return a ``SamModel`` from a folder, in evaluation mode on the CPU; nothing is downloaded or unpickled.

    Args:
        folder: with ``config.json`` and ``model.safetensors``, as ``save_pretrained`` writes them.

    Raises:
        ValueError: transformers is not installed, or the folder holds no such model.
    """
    place = Path(folder)
    for name in ("config.json", WEIGHTS):
        if not (place / name).is_file():
            raise ValueError(
                f"{place} is no folder of a SamModel: it has no {name}; give one that holds config.json and {WEIGHTS}, "
                "for example a copy of facebook/sam-vit-base"
            )
    kind = _transformers().SamModel
    try:
        config = json.loads((place / "config.json").read_text())
        if config.get("model_type") != "sam":
            raise ValueError(f"its config.json is of model_type {config.get('model_type')!r}, not 'sam'")
        model, found = kind.from_pretrained(
            str(place), local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # transformers raises many kinds for a broken file
        reason = " ".join(str(error).split())
        raise ValueError(f"{place} cannot be loaded as a SamModel: {reason}") from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ValueError(f"{place / WEIGHTS} lacks {len(missing)} weights of its SamModel, for example {missing[0]}")
    return model.eval()


def build_sam(config: dict[str, Any]) -> Any:
    """Return a ``SamModel`` with fresh weights from ``SamConfig.to_dict()``.

    Raises:
        ValueError: transformers is not installed.
    """
    library = _transformers()
    return library.SamModel(library.SamConfig.from_dict(config)).eval()


def _transformers() -> Any:
    if importlib.util.find_spec("transformers") is None:
        raise ValueError('SAM needs transformers, which is not installed: pip install "agssd[regions]"')
    import transformers

    return transformers


def sam_size(sam: Any) -> int:
    """Return the edge in pixels of SAM's square input."""
    return int(sam.config.vision_config.image_size)


def fitted_size(height: int, width: int, edge: int) -> tuple[int, int]:
    """Return the size that a frame takes in a square of ``edge`` pixels: its longer side fills it."""
    scale = edge / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def to_sam(image: Tensor, edge: int) -> Tensor:
    """Return frames as SAM takes them: longer side ``edge``, normalised, zeros below and to the right.

    Args:
        image: (B, C, H, W) float32 in [0, 1]; three channels are taken for red, green and blue, of any other number
            the first is shown in grey.
        edge: of SAM's input in pixels.

    Returns:
        (B, 3, edge, edge) float32.
    """
    picture = image if image.shape[1] == 3 else image[:, :1].expand(-1, 3, -1, -1)
    height, width = fitted_size(image.shape[-2], image.shape[-1], edge)
    resized = F.interpolate(picture, (height, width), mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(values, device=image.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return F.pad((resized - mean) / std, (0, edge - width, 0, edge - height))


def from_sam(masks: Tensor, edge: int, height: int, width: int) -> Tensor:
    """Return mask logits on the frame's own pixels.

    Args:
        masks: (B, M, h, w) float32, of SAM's decoder, over its whole square input.
        edge: of that input.
        height: of the frame.
        width: of the frame.

    Returns:
        (B, M, height, width) float32.
    """
    inner = fitted_size(height, width, edge)
    whole = F.interpolate(masks, (edge, edge), mode="bilinear", align_corners=False)
    return F.interpolate(whole[..., : inner[0], : inner[1]], (height, width), mode="bilinear", align_corners=False)


class Adapter(nn.Module):
    """Adds a bottleneck's answer to the output of a layer; at first nothing.

    Source: Houlsby et al. 2019 (a bottleneck behind attention and behind the MLP of each block).

    Args:
        inner: the layer; returns (..., dim), or a tuple whose first item is that.
        dim: channels.
        hidden: of the bottleneck.
    """

    def __init__(self, inner: nn.Module, dim: int, hidden: int) -> None:
        super().__init__()
        self.inner = inner
        self.down, self.up = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer returns, adapted."""
        out = self.inner(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        adapted = first + self.up(F.gelu(self.down(first)))
        return (adapted, *out[1:]) if isinstance(out, tuple) else adapted


def add_adapters(sam: Any, hidden: int) -> list[nn.Parameter]:
    """Put adapters behind attention and MLP of every block of SAM's image encoder, and return their parameters."""
    dim = int(sam.config.vision_config.hidden_size)
    for layer in sam.vision_encoder.layers:
        layer.attn, layer.mlp = Adapter(layer.attn, dim, hidden), Adapter(layer.mlp, dim, hidden)
    adapters = [module for module in sam.vision_encoder.modules() if isinstance(module, Adapter)]
    return [p for adapter in adapters for linear in (adapter.down, adapter.up) for p in linear.parameters()]
