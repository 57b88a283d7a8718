"""A 2D encoder on every slice of a volume, as a baseline for 3D encoders; frozen only."""

from __future__ import annotations

from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agssd.models.backbone import Backbone
from agssd.types import Features, Triple

Axis = Literal["axial", "coronal", "sagittal"]
AXES: tuple[Axis, ...] = ("axial", "coronal", "sagittal")  # across D, H, W
RANDOM = "random"


class SliceEncoder(Backbone):
    """Runs a timm model on each slice, resized to the model's input; tokens lie on a grid of the volume.

    ``cls`` is the mean over slices of the model's pooled feature. Tokens are the model's last feature map of each
    slice, resized bilinearly to one token per 1 x ``patch_vox`` x ``patch_vox`` voxels, the 1 across ``axis``. One grey
    channel is repeated for models of colour pictures; intensities go from ``value_range`` to [0, 1] and through the
    model's own mean and standard deviation. It is evaluated only: no gradient, no masks.

    Source: slice-wise evaluation of 2D foundation models on volumes; the details are ours.

    Args:
        model: a timm model without classifier (``num_classes=0``).
        in_channels: of the volumes: 1, or what the model takes.
        axis: across which slices are cut.
        patch_vox: in-plane voxels per token and axis.
        value_range: of the volumes' intensities.
        batch_size: slices per forward pass.

    Raises:
        ValueError: if the channels do not fit, or the model pools to another width than its feature map's.
    """

    def __init__(
        self,
        model: nn.Module,
        in_channels: int = 1,
        axis: Axis = "axial",
        patch_vox: int = 8,
        value_range: tuple[float, float] = (0.0, 1.0),
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        about: dict[str, Any] = getattr(model, "pretrained_cfg", {})
        self.model = model.eval().requires_grad_(False)
        self.axis = AXES.index(axis)
        sizes = [patch_vox] * 3
        sizes[self.axis] = 1
        self.patch_size: Triple = (sizes[0], sizes[1], sizes[2])
        self.in_channels, self.value_range, self.batch_size = in_channels, value_range, batch_size
        self.channels = int(about.get("input_size", (3, 224, 224))[0])
        self.input_size = tuple(int(n) for n in about.get("input_size", (3, 224, 224))[1:])
        if in_channels not in (1, self.channels):
            raise ValueError(
                f"volumes have {in_channels} channels, the slice model takes {self.channels} or grey slices"
            )
        for name in ("mean", "std"):
            values = about.get(name, (0.0,) if name == "mean" else (1.0,))
            self.register_buffer(f"_{name}", torch.tensor(values).float().view(1, -1, 1, 1), persistent=False)
        self.embed_dim = int(model.num_features)  # type: ignore[arg-type]  # timm declares it nowhere
        self.depth = 0
        self.level_channels, self.level_strides, self.config = (), (), {}

    @torch.no_grad()
    def _slices(self, slices: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, E, h, w) maps and (B, E) pooled features of slices (B, C, H, W)."""
        low, high = self.value_range
        unit = (slices - low) / (high - low)
        unit = F.interpolate(unit, self.input_size, mode="bilinear", align_corners=False, antialias=True)
        pictures = (unit.expand(-1, self.channels, -1, -1) - self.get_buffer("_mean")) / self.get_buffer("_std")
        model: Any = self.model
        found = model.forward_features(pictures)
        pooled = model.forward_head(found, pre_logits=True)
        if found.ndim == 3:  # tokens, [CLS] and registers in front
            tokens = found[:, int(getattr(model, "num_prefix_tokens", 0)) :]
            rows, columns = model.patch_embed.grid_size
            maps = tokens.transpose(1, 2).reshape(len(tokens), -1, rows, columns)
        else:  # maps, channels last in Swin and its kin
            maps = found if found.shape[1] == self.embed_dim else found.movedim(-1, 1)
        if maps.shape[1] != self.embed_dim or pooled.shape[1:] != (self.embed_dim,):
            raise ValueError(
                f"the slice model gives maps of {maps.shape[1]} and pooled features of {list(pooled.shape[1:])} "
                f"channels where both must have {self.embed_dim}; choose a plain ViT or ConvNet"
            )
        return maps, pooled

    def forward(self, x: Tensor, drop_noise: Tensor | None = None) -> Features:
        """Return features of volumes (B, C, D, H, W); nothing is dropped here."""
        d, h, w = grid = self.check_input(x)
        sliced = x.movedim(self.axis + 2, 1)  # (B, S, C, h, w)
        in_plane = [n for axis, n in enumerate(grid) if axis != self.axis]
        maps, pooled = [], []
        for part in sliced.flatten(0, 1).split(self.batch_size):
            found, feature = self._slices(part.float())
            maps.append(F.interpolate(found.float(), in_plane, mode="bilinear", align_corners=False, antialias=True))
            pooled.append(feature.float())
        volume = torch.cat(maps).unflatten(0, (len(x), -1)).movedim(1, self.axis + 2)  # (B, E, D', H', W')
        cls = torch.cat(pooled).unflatten(0, (len(x), -1)).mean(1)
        return Features(cls, volume.flatten(2).transpose(1, 2), (d, h, w), [])

    def forward_views(
        self,
        views: list[Tensor],
        masks: list[Tensor | None] | None = None,
        drop_noise: list[Tensor | None] | None = None,
    ) -> list[Features]:
        """Return the features of each group; there are no masks here."""
        if masks is not None and any(mask is not None for mask in masks):
            raise ValueError("a slice encoder takes no masks; it is a frozen baseline")
        return [self(view) for view in views]


def load_slice_model(name: str, weights: str | Path) -> nn.Module:
    """Return a timm model without classifier and with the weights of a local file; nothing is downloaded.

    Args:
        name: of timm, for example ``vit_small_patch16_dinov3``.
        weights: a file of safetensors or a PyTorch state dict, read as data only, in timm's names or in those of the
            model's authors that timm knows; "random" for fresh weights, the same each time.

    Raises:
        ValueError: without timm, for a name that it does not know, and for a file that is not there or does not fit.
    """
    try:
        import timm
        from timm.models import load_state_dict
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
        raise ValueError(
            f"slice-wise encoders need timm, and a torchvision that fits torch ({error}); install them with: "
            "pip install 'agssd[slices]'"
        ) from None
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--slices {name}: timm cannot make this model ({error}); see timm.list_models()") from None
    if str(weights) == RANDOM:
        return model
    if not Path(weights).is_file():
        raise ValueError(f"--weights {weights}: no such file; download the weights of {name} first, or say {RANDOM}")
    try:
        state = load_state_dict(str(weights), use_ema=False, weights_only=True)
    except Exception as error:
        raise ValueError(f"--weights {weights} cannot be read as weights: {str(error).partition(chr(10))[0]}") from None
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    heads = tuple(f"{head}." for head in ((classifier,) if isinstance(classifier, str) else tuple(classifier)))
    try:
        if {key for key in state if not key.startswith(heads)} != set(model.state_dict()):
            state = _in_timm_names(state, model)
        model.load_state_dict({key: value for key, value in state.items() if not key.startswith(heads)})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"--weights {weights} do not fit {name}: {reason}") from None
    return model


def _in_timm_names(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return ``state`` as timm's own loader would rename it for ``model``; as it is where timm knows no other names."""
    convert = getattr(import_module(type(model).__module__), "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        with redirect_stdout(StringIO()):  # it prints what it tries
            converted: dict[str, Tensor] = convert(state, model)
    except (AttributeError, KeyError, RuntimeError, ValueError):  # nothing that it knows
        return state
    return converted
