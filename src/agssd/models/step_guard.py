"""Whether an optimiser step may be taken: loss and gradient are finite, on every rank; else nothing moves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from agssd.distributed import all_max


class StepGuard:
    """Judges each optimiser step by its loss and gradient, and withholds a step that is not finite.

    Every rank comes to the same judgement. On CUDA the host is not waited for: the judgement stays on the device and
    the kernels of the step do nothing (the fused AdamW by its ``found_inf``, the others by a select). Elsewhere, and
    for parameters sharded by FSDP, the host reads it.

    Source: ours; ``found_inf`` is what torch's gradient scaler uses in fp16.
    """

    def __init__(self) -> None:
        self.withheld: Tensor | None = None  # () float32, 1 where the step under way or just taken is withheld
        self.in_a_row: Tensor | None = None  # (): withheld steps up to the last
        self.on_device = False
        self.local: Tensor | None = None  # (): total loss of this rank, summed over micro-batches
        self.reduced: Tensor | None = None  # (T,): total and terms, summed over micro-batches and ranks
        self.num_batches = 0  # micro-batches of the step under way
        self._judged: tuple[list[Tensor], Tensor] | None = None  # gradients of the step under way, and their norm
        self._buffers: tuple[nn.Module, list[tuple[nn.Module, str]]] | None = None  # of the module last kept

    def observe(self, local: Tensor, reduced: Tensor) -> Tensor:
        """Take a micro-batch's loss into account, and return the mean of ``reduced`` over those of this step.

        Args:
            local: () total loss of this rank.
            reduced: (T,) total loss and its terms over all ranks, the same on each.
        """
        local, reduced = local.detach().float(), reduced.detach()
        self.local = local if self.local is None else self.local + local
        self.reduced = reduced if self.reduced is None else self.reduced + reduced
        self.num_batches += 1
        return self.reduced / self.num_batches

    def judge(self, optimizer: torch.optim.Optimizer) -> Tensor | None:
        """Decide on the step whose gradients are complete; withhold it from ``optimizer`` if it is not finite.

        Returns:
            (3 + T,) float32 on the device: how many steps in a row are withheld with this one, 0 if it is taken; the
            norm of the gradient, this rank's loss, and the reduced losses; for the host to read when it costs nothing.
            None where nothing was judged.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)).float())
        self._judged = gradients, norm
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        losses = [value.reshape(-1) for value in (self.local, self.reduced) if value is not None]
        figures = torch.cat([norm.reshape(1), *losses])
        self.withheld = all_max((~figures.isfinite()).any().float())
        self.in_a_row = self.withheld if self.in_a_row is None else (self.in_a_row + 1) * self.withheld
        self.local = self.reduced = None
        self.num_batches = 0
        self.on_device = stays_on_device(self.withheld.device, parameters)
        if self.on_device:
            optimizer.found_inf = self.withheld  # type: ignore[attr-defined]  # torch sets and reads it, declared nowhere
        elif self.withheld:
            for parameter in parameters:
                parameter.grad = None  # skipped altogether: a zero gradient would still move and decay the weights
            self._judged = [], norm
        return torch.cat([self.in_a_row.reshape(1), figures])

    def clip(self, max_norm: float) -> bool:
        """Scale the gradients just judged to a norm of at most ``max_norm``, which takes no second look at them.

        Returns:
            False where nothing was judged, so that somebody else has to.
        """
        if self._judged is None:
            return False
        gradients, norm = self._judged
        self.forget()
        if gradients:
            torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return True

    def forget(self) -> None:
        """Let go of the gradients just judged, which would take memory until the next are."""
        self._judged = None

    @contextmanager
    def keeping(self, module: nn.Module) -> Iterator[None]:
        """Undo what the body does to the buffers of ``module`` if the step is withheld."""
        if self.withheld is None or (not self.on_device and not self.withheld):
            yield
            return
        if self._buffers is None or self._buffers[0] is not module:  # walking the names takes long for every step
            self._buffers = module, _moving_buffers(module)
        buffers: list[Tensor] = [getattr(layer, name) for layer, name in self._buffers[1]]
        kept = [(buffer, buffer.clone()) for buffer in buffers]
        yield
        for buffer, before in kept:
            buffer.copy_(torch.where(self.withheld.bool(), before, buffer))


class NoStepGuard(StepGuard):
    """Judges nothing: every step is taken as Lightning alone takes it, and losses are those of the last micro-batch.

    For a run without :class:`~agssd.callbacks.non_finite.NonFinite`, which needs the judgement.
    """

    def observe(self, local: Tensor, reduced: Tensor) -> Tensor:
        """Return ``reduced`` as it is."""
        return reduced

    def judge(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the step be taken."""

    @contextmanager
    def keeping(self, module: nn.Module) -> Iterator[None]:
        """Keep nothing."""
        yield


def stays_on_device(device: torch.device, parameters: Iterable[Tensor]) -> bool:
    """Return whether the judgement need not be read by the host: on CUDA, with parameters that are not sharded."""
    return device.type == "cuda" and not any(isinstance(parameter, DTensor) for parameter in parameters)


def _moving_buffers(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return layer and name of each buffer that training may move: those that checkpoints hold."""
    stored = module.state_dict(keep_vars=True).keys()
    names = [name.rpartition(".") for name, _ in module.named_buffers() if name in stored]
    return [(module.get_submodule(layer), name) for layer, _, name in names]
