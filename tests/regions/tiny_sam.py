"""A small random SamModel in a folder, and a made set of frames with a bright and a dark object on speckle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import SamConfig, SamModel

from agssd.data_modules.build import CacheWriter
from agssd.models.lp_sam import LPSAM, LPSAMSettings
from agssd.scans.case import PreparedCase

EDGE = 64


def tiny_config() -> Any:
    return SamConfig(
        vision_config={
            "hidden_size": 32,
            "output_channels": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": EDGE,
            "patch_size": 8,
            "window_size": 4,
            "global_attn_indexes": [1],
            "num_pos_feats": 16,
            "mlp_dim": 64,
            "initializer_range": 0.02,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": EDGE, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 32,
            "mlp_dim": 64,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 32,
            "num_hidden_layers": 2,
        },
    )


def save_tiny_sam(folder: Path, seed: int = 0) -> Path:
    """Write the folder of a random SamModel and return its path."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        SamModel(tiny_config()).save_pretrained(folder)
    return folder


def made_frames(seed: int, count: int = 2, shape: tuple[int, int] = (48, 64)) -> tuple[np.ndarray, np.ndarray]:
    """Return frames (T, H, W) int16 of speckle, and labels: 1 a bright disc at left, 2 a dark one at right."""
    rng = np.random.default_rng(seed)
    height, width = shape
    y, x = np.indices(shape)
    label = np.zeros((count, *shape), dtype=np.uint8)
    for frame in label:
        for value, left in ((1, 0.3), (2, 0.7)):
            middle = (rng.uniform(0.35, 0.65) * height, (left + rng.uniform(-0.08, 0.08)) * width)
            frame[(y - middle[0]) ** 2 + (x - middle[1]) ** 2 < (rng.uniform(0.15, 0.22) * height) ** 2] = value
    level = np.choose(label, [100, 200, 30])
    return (level * rng.normal(1, 0.15, label.shape)).clip(0, 255).round().astype(np.int16), label


def made_cache(path: Path, num_cases: int = 10, count: int = 2) -> Path:
    """Write a cache of such frames: the last two cases in val, all others in train."""
    with CacheWriter(path) as writer:
        for row in range(num_cases):
            image, label = made_frames(row, count)
            affine = np.diag([1.0, -1.0, 1.0, 1.0])
            case = PreparedCase(
                image=image[None], foreground=np.ones(label.shape, np.uint8), label=label, modality="us",
                spacing_mm=(1.0, 1.0, 1.0), affine=affine, source_shape=label.shape[::-1], source_affine=affine,
                source_sha256=f"{row:064x}", scale=(1.0,), offset=(0.0,), low=(0.0,), high=(255.0,),
                edge_q99=(100.0,), spatial_dims=2,
            )  # fmt: skip
            writer.add(case, f"case{row:03d}", f"subject{row:03d}", "val" if row >= num_cases - 2 else "train")
        writer.finish()
    return path


def save_tiny_adapted(path: Path) -> Path:
    """Write what a checkpoint of LP-SAM's first stage holds, of fresh weights, and return its path."""
    model = LPSAM(SamModel(tiny_config()), LPSAMSettings(adapter_dim=4))
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"lp_sam": model.plain(), "state_dict": state}, path)
    return path
