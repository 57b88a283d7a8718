"""Two optimiser steps of a recipe as Lightning takes them, on real tensors or on fake ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from agssd.methods.base import PretrainModule, gradient_norms
from agssd.types import ParentBatch, Size

Stage = Literal["views", "forward", "backward", "optimiser"]
AT = 0.9  # share of the run that is rehearsed: every schedule that rises has risen
_DTYPES: dict[str, torch.dtype | None] = {
    "None": None,
    "32": None,
    "32-true": None,
    "bf16": torch.bfloat16,
    "bf16-mixed": torch.bfloat16,
    "16": torch.float16,
    "16-mixed": torch.float16,
}


@dataclass(frozen=True)
class Step:
    """What decides how much memory a step takes, besides the model and the size of its batch.

    Attributes:
        autocast: dtype of mixed precision, None in full precision.
        accumulate: micro-batches per optimiser step.
        clip: norm to which gradients are clipped; 0 for none.
        max_steps: optimiser steps of the run.
        mask_ratio: what the callback ``mask_ratio`` sets, None where the recipe keeps its own.
        foreach: whether the optimiser works on all parameters at once, as torch does on CUDA.
    """

    autocast: torch.dtype | None
    accumulate: int
    clip: float
    max_steps: int
    mask_ratio: tuple[float, float] | None
    foreach: bool


def autocast_of(precision: Any) -> torch.dtype | None:
    """Return the dtype of ``trainer.precision``.

    Raises:
        ValueError: for a precision that a plan does not know.
    """
    if str(precision) not in _DTYPES:
        raise ValueError(f"trainer.precision is {precision}; a plan knows {', '.join(list(_DTYPES)[1:])}")
    return _DTYPES[str(precision)]


def parent_batch(batch: int, channels: int, parent_vox: Size, regions: bool = False) -> ParentBatch:
    """Return synthetic parent crops: noise in an ellipsoid that fills the crop, and regions that are slabs of it."""
    torch_generator = torch.Generator().manual_seed(0)
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in parent_vox), indexing="ij")
    body = (sum(axis.square() for axis in axes) < 1).to(torch.uint8)  # type: ignore[union-attr]  # sum of tensors
    values = torch.randint(0, 1000, (batch, channels, *parent_vox), generator=torch_generator, dtype=torch.int16)
    ones = torch.ones((batch, channels))
    made: ParentBatch = {
        "image": values * body,
        "foreground": body.expand(batch, 1, *parent_vox).contiguous(),
        "scale": ones,
        "offset": 0 * ones,
        "low": 0 * ones,
        "high": 1000 * ones,
        "edge_q99": 500 * ones,
        "is_ct": torch.zeros(batch, dtype=torch.bool),
        "spacing_mm": torch.ones((batch, len(parent_vox))),
        "centre_mm": torch.zeros((batch, len(parent_vox))),
        "sample": torch.arange(batch),
        "case": torch.arange(batch),
        "broken": torch.full((batch, 4), -1),
    }
    if regions:
        slabs = 1 + torch.arange(parent_vox[-1], dtype=torch.int32) // 8
        made["regions"] = (slabs * body).expand(batch, 1, *parent_vox).contiguous()
    return made


def set_step(model: PretrainModule, step: int, max_steps: int) -> None:
    """Tell ``model`` that ``step`` optimiser steps of its run are done, without a trainer."""
    stand_in = SimpleNamespace(global_step=step, training=True, estimated_stepping_batches=max_steps)
    model._trainer = cast(Any, stand_in)  # all that the schedules of a recipe ask of a trainer
    model.train()


def set_stage(model: PretrainModule, step: Step) -> None:
    """Tell ``model`` that 90 % of its run are done, and how much it hides then."""
    set_step(model, int(AT * step.max_steps), step.max_steps)
    if step.mask_ratio is not None:
        cast(Any, model).mask_ratio = step.mask_ratio


def rehearse(
    model: PretrainModule, step: Step, next_views: Callable[[], Any], at: Callable[[Stage], object], steps: int = 2
) -> None:
    """Take ``steps`` optimiser steps in the order in which Lightning's automatic optimisation takes them.

    Gradients are dropped after the forward pass and not before it, the views of one micro-batch make room for the next,
    and gradient norms are measured, as in the steps that ``CollapseMonitor`` looks at: the dearest kind of step. Of
    accumulated micro-batches two are taken, since the second meets all that a later one would.

    Args:
        model: after :func:`set_stage`.
        step: how a step is taken.
        next_views: returns the views of one micro-batch.
        at: called with the stage that begins.
        steps: how many.
    """
    optimiser = cast(torch.optim.AdamW, model.configure_optimizers())
    for group in optimiser.param_groups:
        group["foreach"] = step.foreach
    micro_batches = min(step.accumulate, 2)
    for _ in range(steps):
        for micro_batch in range(micro_batches):
            at("views")
            views = next_views()
            at("forward")
            with torch.autocast("cpu" if _is_cpu(model) else "cuda", step.autocast, step.autocast is not None):
                loss = model.pretrain_loss(views)
            del views
            model.gradient_norms = gradient_norms(loss, model.weights)
            if micro_batch == 0:
                optimiser.zero_grad()
            at("backward")
            (loss.total / micro_batches).backward()
            del loss
        at("optimiser")
        if step.clip:
            nn.utils.clip_grad_norm_(model.parameters(), step.clip)
        optimiser.step()
        model.after_optimizer_step()
        if model.has_teacher:
            model.update_teacher(0.996)


def _is_cpu(model: nn.Module) -> bool:
    first: Tensor = next(model.parameters())
    return first.device.type == "cpu"
