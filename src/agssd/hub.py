"""Encoders as files: weights with the contract under which they hold, in one safetensors file.

The contract is a flat dict of plain types, kept in the header of ``backbone.safetensors`` (so the file alone suffices)
and, for readers, beside it in ``backbone.json``: ``format``, ``format_version``, ``backbone`` (class path and init
arguments), ``patch_size``, ``channels``, ``spacing_mm``, ``orientation``, ``modality``, ``intensity`` (rule per
modality), ``method`` (class path of the recipe), ``step``, ``agssd_version`` and ``weights_sha256``. The four fields on
preparation are None if the training run did not know them. ``seen``, where it is known, tells which cases the encoder
was trained on (``agssd.data_modules.leakage.seen_record``); ``backbone.json`` leaves its long lists out.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from agssd import __version__
from agssd.models.backbone import Backbone
from agssd.types import HasBackbone, Size

FILE_NAME = "backbone.safetensors"
FORMAT = "agssd-backbone"
FORMAT_VERSION = 1
MAX_HEADER = 95_000_000  # bytes; safetensors reads 100 MB
PREPARATION = ("spacing_mm", "orientation", "modality", "intensity")


def export_backbone(
    source: str | Path | nn.Module,
    out_dir: str | Path,
    *,
    contract: dict[str, Any] | None = None,
    trust_class: bool = False,
) -> Path:
    """Write ``backbone.safetensors`` and ``backbone.json`` to ``out_dir`` and return the path of the first.

    Both are written to temporary names and renamed when whole; existing ones are replaced.

    Args:
        source: a Lightning checkpoint written by agssd (the teacher's encoder is taken where there is one), a
            ``Backbone``, or a module whose ``backbone`` is one.
        out_dir: created if missing.
        contract: how volumes were prepared (``spacing_mm``, ``orientation``, ``modality``, ``intensity``,
            ``channels``); by default what the checkpoint or the backbone carries.
        trust_class: allow a checkpoint to name a backbone class outside ``agssd``, which imports its module.

    Raises:
        ValueError: if the source is no agssd checkpoint or backbone, or ``out_dir`` cannot be written.
    """
    if isinstance(source, nn.Module):
        backbone, known = _from_module(source)
    else:
        backbone, known = _from_checkpoint(Path(source), trust_class)
    known = known | (contract or {})
    channels = known.get("channels", backbone.in_channels)
    if channels != backbone.in_channels:
        raise ValueError(f"the contract says channels={channels}, the backbone takes {backbone.in_channels}")
    weights = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
    full = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "agssd_version": __version__,
        "method": known.get("method"),
        "step": known.get("step"),
        "backbone": backbone.config,
        "patch_size": list(backbone.patch_size),
        "channels": backbone.in_channels,
        **{name: known.get(name) for name in PREPARATION},
        **{name: known[name] for name in ("adapted_from", "seen") if known.get(name)},
        "weights_sha256": weights_digest(weights),
    }
    try:
        text = json.dumps(full, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the contract must hold plain finite types only: {error}") from None
    if len(text) > MAX_HEADER:  # a million cases
        raise ValueError(
            "the record of the cases that it was trained on does not fit into the header of a safetensors file "
            f"({len(text) / 1e6:.0f} MB of at most {MAX_HEADER / 1e6:.0f}); leave it out with --without-record"
        )
    target = Path(out_dir) / FILE_NAME
    _write_whole(target, lambda path: save_file(weights, path, metadata={"agssd": text}))
    short = {name: _without_lists(value) for name, value in full.items()}
    _write_whole(target.with_suffix(".json"), lambda path: _write_text(path, json.dumps(short, indent=2) + "\n"))
    return target


def load_backbone(
    path: str | Path,
    *,
    in_channels: int | None = None,
    patch_size: int | Size | None = None,
    trust_class: bool = False,
) -> Backbone:
    """Return the encoder of an exported file, in eval mode, strictly loaded; its ``contract`` says what it expects.

    Any input whose size divides by the patch is accepted; positions are made for its grid.

    Args:
        path: ``backbone.safetensors`` or the directory that holds it.
        in_channels: ask for another channel count. Every new channel gets the mean kernel of the old ones times
            old / new count, so a volume repeated over channels gives the response of the mean kernel.
        patch_size: ask for another patch. The kernel is resized so that a linearly resized patch keeps its
            embedding: exactly when the patch grows, in least squares when it shrinks (source: [R: FlexiViT]
            pseudo-inverse resize, per axis).
        trust_class: allow a class outside ``agssd``, which imports the module the file names.

    Raises:
        ValueError: if the file is missing, damaged, foreign, or cannot be adapted as asked.
    """
    file, contract, weights = _read(Path(path))
    kind = _backbone_class(contract["backbone"]["class_path"], trust_class, str(file))
    config, weights, changes = _adapt(kind, contract, weights, in_channels, patch_size)
    backbone = _build(kind, config["init_args"], weights, str(file))
    if changes:
        changes = contract.get("adapted_from", {}) | changes
        contract |= {"channels": backbone.in_channels, "patch_size": list(backbone.patch_size)}
        contract |= {"backbone": backbone.config, "adapted_from": changes}
    backbone.contract = contract
    return backbone


def weights_digest(weights: dict[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes of CPU tensors, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def resize_kernel(kernel: Tensor, patch_size: Size) -> Tensor:
    """Return a patch-embedding kernel (E, C, *patch_size) that embeds resized patches like ``kernel`` the originals.

    Args:
        kernel: (E, C, [d,] h, w).
        patch_size: new ([d,] h, w).
    """
    out = kernel.double()
    for axis, (old, new) in enumerate(zip(kernel.shape[2:], patch_size, strict=True), start=2):
        if old != new:
            unit = torch.eye(old, dtype=torch.float64)[None]  # columns: responses of linear resizing along one axis
            resize = F.interpolate(unit, size=new, mode="linear", align_corners=False)[0].T  # (new, old)
            out = torch.movedim(torch.movedim(out, axis, -1) @ torch.linalg.pinv(resize), -1, axis)
    return out.to(kernel.dtype).contiguous()


def _from_module(module: nn.Module) -> tuple[Backbone, dict[str, Any]]:
    if isinstance(module, Backbone):
        return module, dict(module.contract or {})
    backbone = module.backbone if isinstance(module, HasBackbone) else None
    if not isinstance(backbone, Backbone):
        raise ValueError(f"{type(module).__name__} is neither a Backbone nor has one as `backbone`; nothing to export")
    method = f"{type(module).__module__}.{type(module).__qualname__}"
    return backbone, dict(backbone.contract or {}) | {"method": method, "step": getattr(module, "global_step", None)}


def _from_checkpoint(file: Path, trust_class: bool) -> tuple[Backbone, dict[str, Any]]:
    if not file.is_file():
        raise ValueError(f"{file}: no such checkpoint file")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are none of torch's can make its unpickler raise anything
        raise ValueError(f"{file}: cannot be read as a checkpoint ({type(error).__name__}); is it whole?") from None
    about = checkpoint.get("agssd") if isinstance(checkpoint, dict) else None
    if not isinstance(about, dict) or not {"backbone", "state_prefix"} <= about.keys():
        raise ValueError(f"{file}: has no 'agssd' entry; only checkpoints of agssd recipes can be exported")
    prefix = about["state_prefix"]
    weights = {n[len(prefix) :]: v for n, v in checkpoint["state_dict"].items() if n.startswith(prefix)}
    if not weights:
        raise ValueError(f"{file}: no weights under {prefix!r}; the checkpoint does not hold the encoder it names")
    kind = _backbone_class(about["backbone"]["class_path"], trust_class, str(file))
    backbone = _build(kind, about["backbone"]["init_args"], weights, str(file))
    known = {"method": about.get("method"), "step": checkpoint.get("global_step")}
    return backbone, dict(about.get("contract") or {}) | known


def _read(path: Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file}: no such file; give {FILE_NAME} as written by `agssd export RUN --out DIR`, or DIR")
    if file.suffix == ".ckpt":
        raise ValueError(f"{file}: is a training checkpoint; run `agssd export {file} --out DIR` and load DIR")
    try:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
            weights = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: is no whole safetensors file ({error}); export it again") from None
    try:
        contract = json.loads(metadata.get("agssd", "null"))
    except json.JSONDecodeError:
        contract = None
    if not isinstance(contract, dict) or contract.get("format") != FORMAT:
        raise ValueError(f"{file}: carries no agssd contract; it was not written by `agssd export`")
    if contract["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{file}: has format version {contract['format_version']}, this agssd {__version__} reads "
            f"{FORMAT_VERSION}; it was written by agssd {contract.get('agssd_version')}, use that version"
        )
    if weights_digest(weights) != contract["weights_sha256"]:
        raise ValueError(f"{file}: weights do not match their SHA-256; the file was altered, export it again")
    return file, contract, weights


def _backbone_class(class_path: str, trust_class: bool, where: str) -> type[Backbone]:
    module_name, _, class_name = class_path.rpartition(".")
    if not trust_class and not module_name.startswith("agssd."):
        raise ValueError(
            f"{where}: names the class {class_path} outside agssd, which would be imported and run; "
            f"pass trust_class=True (--trust-class) if you trust the file"
        )
    try:
        kind = getattr(import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError):
        raise ValueError(f"{where}: the class {class_path} cannot be imported; install what defines it") from None
    if not (isinstance(kind, type) and issubclass(kind, Backbone)):
        raise ValueError(f"{where}: {class_path} is no Backbone")
    return kind


def _build(kind: type[Backbone], init_args: dict[str, Any], weights: dict[str, Tensor], where: str) -> Backbone:
    with torch.random.fork_rng(devices=[]):  # the throw-away initialisation must not move the caller's generator
        try:
            backbone = kind(**init_args)
        except TypeError as error:
            raise ValueError(f"{where}: {kind.__name__} cannot be built from its own config: {error}") from None
    own = backbone.state_dict()
    missing, foreign = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    unequal = [
        f"{name} file {tuple(weights[name].shape)} model {tuple(own[name].shape)}"
        for name in sorted(own.keys() & weights.keys())
        if own[name].shape != weights[name].shape
    ]
    if missing or foreign or unequal:
        raise ValueError(
            f"{where}: weights do not fit {kind.__name__} as configured: missing {missing[:4]}, without place "
            f"{foreign[:4]}, of other shape {unequal[:4]}; other channels or patches need in_channels= or patch_size="
        )
    backbone.load_state_dict(weights)
    return backbone.eval()


def _adapt(
    kind: type[Backbone],
    contract: dict[str, Any],
    weights: dict[str, Tensor],
    in_channels: int | None,
    patch_size: int | Size | None,
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Return config and weights for the channels and patch asked for, and what they were before."""
    config, own_patch = contract["backbone"], tuple(contract["patch_size"])
    init_args = dict(config["init_args"])
    if in_channels is None and patch_size is None:
        return config, weights, {}
    if kind.input_weight not in weights:
        raise ValueError(f"{kind.__name__} cannot be adapted to other channels or patches; load it without either")
    kernel = weights[kind.input_weight]
    changes: dict[str, Any] = {}
    if in_channels is not None and in_channels != kernel.shape[1]:
        if in_channels < 1:
            raise ValueError(f"in_channels is {in_channels}; use at least 1")
        changes["channels"] = kernel.shape[1]
        mean = kernel.mean(1, keepdim=True) * (kernel.shape[1] / in_channels)
        kernel = mean.repeat(1, in_channels, *[1] * len(own_patch))
        init_args["in_channels"] = in_channels
    if patch_size is not None:
        new_patch = (patch_size,) * len(own_patch) if isinstance(patch_size, int) else tuple(patch_size)
        if min(new_patch) < 1 or len(new_patch) != len(own_patch):
            raise ValueError(f"patch_size is {new_patch}; use at least 1 per axis, on {len(own_patch)} axes")
        if new_patch != own_patch:
            if own_patch != tuple(kernel.shape[2:]) or tuple(init_args.get("patch_size", ())) != own_patch:
                raise ValueError(
                    f"{kind.__name__} has tokens of {own_patch} voxels and cannot be adapted to {new_patch}; load it "
                    "without patch_size"
                )
            changes["patch_size"] = list(kernel.shape[2:])
            kernel = resize_kernel(kernel, new_patch)
            init_args["patch_size"] = list(new_patch)
    return {**config, "init_args": init_args}, {**weights, kind.input_weight: kernel}, changes


def _without_lists(value: Any) -> Any:
    """Return an entry of the contract without the record's lists of subjects and hashes, which are for machines."""
    if not isinstance(value, dict):
        return value
    return {name: item for name, item in value.items() if name not in ("subjects", "hashes")}


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _write_whole(target: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``target``, then rename it; leave nothing behind on failure."""
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp gives 0600
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{target}: cannot be written: {error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
