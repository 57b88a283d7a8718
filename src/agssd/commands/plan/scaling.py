"""What a run takes on some numbers of GPUs, as arithmetic on stated figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GPUS = (1, 8, 64, 512)


@dataclass(frozen=True)
class Run:
    """What decides how long a run takes.

    Attributes:
        max_steps: optimiser steps.
        global_batch: samples per optimiser step.
        largest: samples that fit into one micro-batch of a GPU, by the number of GPUs; None where it is not known.
        seconds_per_sample: on one GPU; None where it is not known.
        gradient_bytes: that DDP reduces once per optimiser step, FSDP2 once per micro-batch.
        buffer_bytes: that DDP broadcasts once per optimiser step.
        gathered_bytes: that FSDP2 gathers per micro-batch, in forward and backward pass; None for DDP.
        link: bytes per second that each GPU sends; None counts communication as free.
        bytes_per_sample: read from the cache.
    """

    max_steps: int
    global_batch: int
    largest: Mapping[int, int] | None
    seconds_per_sample: float | None
    gradient_bytes: int
    buffer_bytes: int
    link: float | None
    bytes_per_sample: float
    gathered_bytes: int | None = None


@dataclass(frozen=True)
class Row:
    """One number of GPUs; ``refused`` says why the run cannot have it."""

    gpus: int
    refused: str = ""
    micro_batch: int = 0
    accumulate: int = 1
    sent_bytes: int = 0  # by each GPU per optimiser step
    samples_per_s: float | None = None
    hours: float | None = None
    gpu_hours: float | None = None
    read_bytes_per_s: float | None = None


def row(run: Run, gpus: int) -> Row:
    """Return the figures of ``run`` on ``gpus`` GPUs: the same global batch, cut into the largest parts that fit."""
    share, rest = divmod(run.global_batch, gpus)
    if rest or not share:
        return Row(gpus, f"data.global_batch_size {run.global_batch} cannot be divided by {gpus}")
    fits = share if run.largest is None else run.largest[gpus]
    micro_batch = next((size for size in range(min(share, fits), 0, -1) if share % size == 0), 0)
    if not micro_batch:
        return Row(gpus, "not even one sample per micro-batch fits")
    accumulate = share // micro_batch
    if run.gathered_bytes is None:
        # a ring sends each gradient 2 (n - 1) / n times; DDP reduces once per step, and broadcasts buffers once per
        # step: before a forward pass that follows one under no_sync it does not
        sent = 0 if gpus == 1 else round(2 * (gpus - 1) / gpus * run.gradient_bytes + run.buffer_bytes)
    else:
        sent = round(accumulate * (gpus - 1) / gpus * (run.gathered_bytes + run.gradient_bytes))
    if run.seconds_per_sample is None:
        return Row(gpus, "", micro_batch, accumulate, sent)
    seconds = share * run.seconds_per_sample + (sent / run.link if run.link else 0.0)
    hours = run.max_steps * seconds / 3600
    rate = run.global_batch / seconds
    return Row(gpus, "", micro_batch, accumulate, sent, rate, hours, hours * gpus, rate * run.bytes_per_sample)
