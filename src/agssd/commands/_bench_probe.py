"""What the probe costs while training: its time beside that of the steps between two probes, in one run."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Callback

STEPS_TIMED = 10  # per round; the interval is as many times longer as it is
_SHAPE = (36, 50, 36)  # about a hippocampus crop of the Medical Segmentation Decathlon at 1 mm
_SUBJECTS = {"train": 16, "val": 16}  # what a probe takes by default


def interval() -> int:
    """Return the optimiser steps between two probes by default."""
    from agssd.callbacks.online_probe import OnlineProbe

    return int(inspect.signature(OnlineProbe).parameters["every_n_steps"].default)


def time_probe(rounds: int, device: Any, folder: Path) -> list[tuple[float, float]]:
    """Return per round the seconds of one probe and of the steps of the default interval before it.

    SimMIM, whose step is cheap, at the size of conf/experiment/small.yaml; the steps are those of one run as it is,
    with data loading and views, of which ``STEPS_TIMED`` are timed before each probe.

    Args:
        rounds: how many, after one probe that does not count.
        device: torch device.
        folder: for the cache of simulated volumes.
    """
    from agssd.callbacks.online_probe import OnlineProbe
    from agssd.callbacks.throughput import Throughput
    from agssd.data_modules.pretrain import PretrainDataModule
    from agssd.methods.simmim import SimMIM
    from agssd.models.vit import ViT
    from agssd.transforms.crops import OverlapCrops

    cache = folder / "probe.h5"
    write_cache(cache)
    pairs: list[tuple[float, float]] = []
    with quiet():
        trainer = bench_trainer(
            device,
            max_steps=rounds * STEPS_TIMED,
            callbacks=[
                Throughput(every_n_steps=STEPS_TIMED, max_data_wait=1.0),
                OnlineProbe(every_n_steps=STEPS_TIMED, window_vox=(32, 32, 32), max_time_share=1.0),
                _reader(pairs),
            ],
            enable_checkpointing=False,
        )
        module = SimMIM(
            ViT(1, 8, embed_dim=192, depth=4, num_heads=3),
            OverlapCrops(size_vox=(32, 32, 32), scale=(0.4, 0.9), num_local=0),
        )
        trainer.fit(module, PretrainDataModule(str(cache), (40, 56, 40), 16, num_workers=2))
    return pairs


def bench_trainer(device: Any, **settings: Any) -> Any:
    """Return a trainer for ``device`` that writes and shows nothing by itself, unless ``settings`` say so."""
    import lightning.pytorch as L

    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1 if device.index is None or device.type == "cpu" else [device.index],
        precision="bf16-mixed",
        limit_val_batches=0,
        use_distributed_sampler=False,
        **{**silent, **settings},
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's advice inside."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _reader(pairs: list[tuple[float, float]]) -> Callback:
    from lightning.pytorch import Callback

    class Reader(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            found = trainer.callback_metrics
            if trainer.global_step == (len(pairs) + 1) * STEPS_TIMED:
                step = float(found["throughput/s_per_step"])
                pairs.append((float(found["probe/seconds"]), step * interval()))

    return Reader()


def write_cache(path: Path) -> None:
    """Write a cache of noisy bodies with two labelled blobs each."""
    import numpy as np

    from agssd.data_modules.build import CacheWriter
    from agssd.scans.case import PreparedCase

    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in _SHAPE), indexing="ij"))
    with CacheWriter(path) as writer:
        for split, count in _SUBJECTS.items():
            for number in range(count):
                body = (grid**2).sum(0) < 0.8
                label = np.zeros(_SHAPE, np.uint8)
                for value, middle in enumerate(rng.uniform(-0.4, 0.4, (2, 3)), start=1):
                    label[((grid - middle[:, None, None, None]) ** 2).sum(0) < 0.09] = value
                image = body * (rng.normal(300, 20, _SHAPE) + 200.0 * label)
                case = PreparedCase(
                    image=image.astype(np.int16)[None],
                    foreground=body.astype(np.uint8),
                    label=label,
                    modality="mri",
                    spacing_mm=(1.0, 1.0, 1.0),
                    affine=np.eye(4)[[2, 1, 0, 3]],
                    source_shape=(_SHAPE[2], _SHAPE[1], _SHAPE[0]),
                    source_affine=np.eye(4),
                    source_sha256=f"{number:032x}{len(split):032x}",
                    scale=(1.0,),
                    offset=(0.0,),
                    low=(0.0,),
                    high=(800.0,),
                    edge_q99=(100.0,),
                )
                writer.add(case, f"{split}{number}", f"{split}{number}", split)
        writer.finish()
