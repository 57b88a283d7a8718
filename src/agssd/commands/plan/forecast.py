"""What a step of a recipe will need, from fake tensors: floating-point operations, and bytes by part at their peak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from agssd.commands.plan.ledger import Ledger, fake_batch, inside, make_fake, tensors_in
from agssd.commands.plan.rehearsal import Stage, Step, parent_batch, rehearse, set_stage
from agssd.methods.base import PretrainModule
from agssd.types import Size

WEIGHTS, TEACHER, GRADIENTS, OPTIMISER = "weights", "teacher", "gradients", "optimiser"
INPUTS, ENCODER, HEADS = "views and inputs", "encoder activations", "heads, logits, losses"
BACKWARD, GATHERED = "backward temporaries", "gathered parts (FSDP2)"
STANDING = (WEIGHTS, TEACHER, GRADIENTS, OPTIMISER)  # what FSDP2 spreads
PARTS = (WEIGHTS, TEACHER, GRADIENTS, OPTIMISER, INPUTS, ENCODER, HEADS, BACKWARD, GATHERED)
_PART_OF_STAGE: dict[Stage, str] = {
    "views": INPUTS,
    "forward": HEADS,
    "backward": BACKWARD,
    "optimiser": OPTIMISER,
}


class Forecast:
    """Forecasts of one recipe for any size of micro-batch.

    Views are made from synthetic crops of 1 and of 2 samples with real arithmetic, once; their sizes give those of any
    batch. Encoder, heads, losses, backward pass and optimiser run on fake CPU tensors. Needs a process of its own: what
    is cached meanwhile (masks of shifted windows, say) is fake too and of no use to a training.

    Args:
        model: built inside :func:`agssd.commands.plan.ledger.without_weights`.
        step: how a step is taken.
        channels: of the parent crops.
        parent_vox: their size.
        regions: whether they have region maps.

    Attributes:
        guessed: numbers that fake tensors could not know and that were taken as 1.
    """

    def __init__(
        self, model: PretrainModule, step: Step, channels: int, parent_vox: Size, regions: bool = False
    ) -> None:
        self.model, self.step = model, step
        self._parents = (channels, parent_vox, regions)
        set_stage(model, step)
        made = [self._make_views(batch) for batch in (1, 2)]
        self._views = (made[0][0], made[1][0])
        self._making = (made[0][1], made[1][1])
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        make_fake(model, self._mode)
        self.guessed = 0

    def _make_views(self, batch: int) -> tuple[Any, int]:
        """Return the views of a batch, and the bytes that making them takes beside them, the crops included."""
        parents = parent_batch(batch, *self._parents)
        ledger = Ledger()
        for tensor in parents.values():
            ledger.count(tensor, INPUTS)  # type: ignore[arg-type]  # of a TypedDict of tensors
        with ledger, torch.no_grad():
            views = self.model.make_views(parents)
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        tensors_in(views, keep)
        return views, max(ledger.peak.total() - sum(kept.values()), 0)

    def _next_views(self, batch: int) -> Any:
        """Return fake views of ``batch`` samples after taking, and giving back, what making them takes."""
        one, two = self._making
        with self._mode:
            scratch = torch.empty(max(one + (two - one) * (batch - 1), 1), dtype=torch.uint8)
        views = fake_batch(*self._views, batch, self._mode)
        del scratch
        return views

    def flops(self, batch: int) -> float:
        """Return the floating-point operations per sample of forward and backward pass, a multiply-add as two."""
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        known: dict[Any, Callable[..., int]] = {attention: _attention_flops, attention_backward: _attention_back_flops}
        self._forget_gradients()
        ledger = Ledger()
        with self._mode, FlopCounterMode(display=False, custom_mapping=known) as counter, ledger:
            views = self._next_views(batch)
            with torch.autocast("cpu", self.step.autocast, self.step.autocast is not None):
                loss = self.model.pretrain_loss(views).total
            loss.backward()
        return float(counter.get_total_flops() / batch)

    def memory(self, batch: int, spread_over: int | None = None) -> Counter[str]:
        """Return bytes by part at the peak of an optimiser step with micro-batches of ``batch`` samples.

        Args:
            batch: samples.
            spread_over: devices on which FSDP2 spreads weights, teacher, gradients and moments; None for DDP.
        """
        self._forget_gradients()
        ledger = Ledger({} if spread_over is None else dict.fromkeys(STANDING, 1 / spread_over))
        model = self.model
        for tensor in (*model.parameters(), *model.buffers()):
            ledger.count(tensor, WEIGHTS)
        if model.has_teacher:
            for tensor in (*model.teacher.parameters(), *model.teacher.buffers()):
                ledger.count(tensor, TEACHER)
        handles = [
            parameter.register_post_accumulate_grad_hook(lambda p: _count_gradient(ledger, p))
            for parameter in model.parameters()
            if parameter.requires_grad
        ]
        outer: list[str] = []
        stages = 0

        def at(stage: Stage) -> None:
            nonlocal stages
            if stage == "views":
                stages += 1
                if stages == min(self.step.accumulate, 2) + 1:
                    ledger.start()  # of the second optimiser step, which has moments and what the first one left
            ledger.part = _PART_OF_STAGE[stage]

        def enter(part: str) -> None:
            outer.append(ledger.part)
            ledger.part = part if ledger.part != BACKWARD else BACKWARD

        def leave() -> None:
            ledger.part = outer.pop()

        try:
            with self._mode, ledger, inside(self._encoder_parts(), enter, leave):
                rehearse(model, self.step, lambda: self._next_views(batch), at)
        finally:
            for handle in handles:
                handle.remove()
        self.guessed = max(self.guessed, ledger.guessed)
        return ledger.peak if spread_over is None else ledger.peak + Counter({GATHERED: self._gathered()})

    def _gathered(self) -> int:
        """Return the bytes that FSDP2 holds whole beside the parts of a device.

        A block with its gradient and the next one on its way; and what belongs to no block, for the whole of a step.
        """
        blocks = [part for encoder in self.model.encoders() for part in encoder.shardable_parts()]
        in_blocks = {id(parameter) for block in blocks for parameter in block.parameters()}
        rest = [parameter for parameter in self.model.parameters() if id(parameter) not in in_blocks]
        largest = max((sum(map(_bytes, block.parameters())) for block in blocks), default=0)
        return sum(map(_bytes, rest)) + sum(_bytes(one) for one in rest if one.requires_grad) + 3 * largest

    def _encoder_parts(self) -> dict[nn.Module, str]:
        networks = [self.model.student, *([self.model.teacher] if self.model.has_teacher else [])]
        return {module: ENCODER for network in networks for module in network["backbone"].modules()}

    def _forget_gradients(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def largest(self, budget: float, known: dict[int, int], spread_over: int | None = None) -> int:
        """Return the largest micro-batch whose peak is at most ``budget`` bytes, 0 if not even one sample fits.

        Args:
            budget: bytes.
            known: peaks in bytes by batch; what is found out is added.
            spread_over: as in :meth:`memory`.
        """

        def peak(batch: int) -> int:
            if batch not in known:
                known[batch] = self.memory(batch, spread_over).total()
            return known[batch]

        if peak(1) > budget:
            return 0
        second = next((batch for batch in known if batch > 1), 2)
        slope = (peak(second) - peak(1)) / (second - 1)  # memory is almost a straight line in the batch
        low, high = 1, _MAX_BATCH + 1  # what fits, and what does not or is beyond reason
        while high - low > 1:
            guess = int(low + (budget - peak(low)) / max(slope, 1.0))
            guess = min(max(guess, low + 1), high - 1)
            if peak(guess) <= budget:
                low = guess
            else:
                high = guess
                slope = (peak(high) - peak(low)) / (high - low)
        return low


_MAX_BATCH = 4096


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _count_gradient(ledger: Ledger, parameter: Tensor) -> None:
    if parameter.grad is not None:
        ledger.count(parameter.grad, GRADIENTS)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_back_flops(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))
