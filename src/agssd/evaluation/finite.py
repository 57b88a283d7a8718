"""Where a training step stops being finite: the input, a parameter, a layer's output, a term, or a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from agssd.distributed import alone
from agssd.types import LossTerms


class Trainable(Protocol):
    """A recipe: views from a batch, a loss from views."""

    def make_views(self, batch: Any) -> Any:
        """Return the views of a batch."""

    def pretrain_loss(self, views: Any) -> LossTerms:
        """Return the loss of views."""


@dataclass(frozen=True)
class Finding:
    """The first place that is not finite, in the order of the computation.

    ``stage`` is one of weights, input, views, forward, loss, backward; ``where`` names the tensor, layer or term.
    """

    stage: str
    where: str
    detail: str

    def __str__(self) -> str:
        """Return the finding as one sentence without a stop."""
        return f"first not finite in {self.stage}: {self.where} ({self.detail})"

    def plain(self) -> dict[str, str]:
        """Return it in plain types."""
        return asdict(self)


def first_non_finite(
    module: Any, batches: Sequence[Any], random_state: Mapping[str, Tensor], dtype: torch.dtype | None
) -> Finding | None:
    """Run the micro-batches of one step through ``module`` and return the first place that is not finite, or None.

    Gradients in use, buffers and random state are left as they were. Other ranks take no part: what gathers over ranks
    sees this rank's samples alone.

    Args:
        module: a recipe, :class:`Trainable`; on its device, in the mode of the step.
        batches: what the data loader gave, on any device.
        random_state: from :func:`random_state_of`.
        dtype: of autocast; None computes in float32.
    """
    for name, tensor in module.state_dict().items():
        if bad := _describe(tensor):
            return Finding("weights", name, bad)
    attributes = _attributes(module)
    kept = {name: tensor.clone() for name, tensor in module.named_buffers()}
    before = random_state_of(module.device)
    restore_random_state(random_state, module.device)
    try:
        with alone(), torch.enable_grad():
            for number, batch in enumerate(batches):
                found = _first_of_batch(module, _moved(batch, module.device), dtype)
                if found is not None:
                    place = f", micro-batch {number} of {len(batches)}" if len(batches) > 1 else ""
                    return Finding(found.stage, found.where, found.detail + place)
    finally:
        restore_random_state(before, module.device)
        for name, buffer in module.named_buffers():
            buffer.copy_(kept[name])
        for layer, values in attributes:
            vars(layer).update(values)
    return None


def _attributes(module: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Return what layers remember outside parameters and buffers: sums and rows that wait for the step's end."""
    found = []
    for layer in module.modules():
        own = {name: value for name, value in vars(layer).items() if isinstance(value, (Tensor, list, type(None)))}
        found.append((layer, {name: list(value) if isinstance(value, list) else value for name, value in own.items()}))
    return found


def _first_of_batch(module: Any, batch: Any, dtype: torch.dtype | None) -> Finding | None:
    for name, tensor in _tensors(batch):
        if bad := _describe(tensor):
            return Finding("input", name, bad + _whose(tensor, batch))
    with torch.no_grad():
        views = module.make_views(batch)
    for name, tensor in _tensors(views):
        if bad := _describe(tensor):
            return Finding("views", name, bad)
    with (
        torch.autocast(module.device.type, dtype or torch.bfloat16, enabled=dtype is not None),
        _watched(module) as saw,
    ):
        loss: LossTerms = module.pretrain_loss(views)
    if saw:
        return saw[0]
    for name, term in (*loss.terms.items(), ("total", loss.total)):
        if bad := _describe(term):
            return Finding("loss", name, bad)
    return _first_gradient(module, loss.total)


def _first_gradient(module: Any, total: Tensor) -> Finding | None:
    """Return the first gradient that is not finite on the way back, named by layer, else by parameter."""
    found: list[Finding] = []
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    try:
        with torch.autograd.set_detect_anomaly(True, check_nan=True):
            gradients = torch.autograd.grad(total, [p for _, p in named], retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "nan values" not in str(error):
            raise
        found.append(Finding("backward", str(error).split("'")[1], "NaN, by anomaly detection"))
        gradients = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    bad = [(name, _describe(g)) for (name, _), g in zip(named, gradients, strict=True) if g is not None]
    bad = [(name, text) for name, text in bad if text]
    if not bad:
        return found[0] if found else None
    name, text = bad[-1]  # the deepest in the forward pass is the first on the way back
    operation = f"operation {found[0].where}, " if found else ""
    return Finding("backward", name, f"{operation}gradient of {len(bad)} parameters not finite; {text}")


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[Finding]]:
    """Yield a list that gets a finding for each layer whose output is not finite, innermost and earliest first."""
    found: list[Finding] = []

    def look(name: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            for _, tensor in _tensors(output):
                if bad := _describe(tensor):
                    clean = all(not _describe(given) for _, given in _tensors(inputs))
                    given = "from finite inputs" if clean else "from inputs that are not finite either"
                    found.append(Finding("forward", name, f"{type(layer).__name__}, {bad}, {given}"))
                    return

        return hook

    handles = [layer.register_forward_hook(look(name)) for name, layer in module.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def random_state_of(device: torch.device) -> dict[str, Tensor]:
    """Return the state of torch's generators, without waiting for the device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Set torch's generators; a state of CUDA is left out on other devices."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def _describe(tensor: Tensor) -> str:
    """Return how many values of ``tensor`` are not finite, in words; empty if all are."""
    if not tensor.is_floating_point() or not tensor.numel():
        return ""
    finite = tensor.detach().isfinite()
    if bool(finite.all()):
        return ""
    nan = int(tensor.detach().isnan().sum())
    return f"{nan} NaN and {int((~finite).sum()) - nan} infinite of {tensor.numel()}, shape {tuple(tensor.shape)}"


def _whose(tensor: Tensor, batch: Any) -> str:
    """Return the samples and cases whose rows of ``tensor`` are not finite."""
    if not isinstance(batch, Mapping) or "sample" not in batch or len(tensor) != len(batch["sample"]):
        return ""
    rows = (~tensor.isfinite()).flatten(1).any(1).nonzero().flatten() if tensor.ndim > 1 else (~tensor.isfinite())
    rows = rows if rows.dtype != torch.bool else rows.nonzero().flatten()
    samples = ", ".join(str(int(batch["sample"][row])) for row in rows)
    return f", of sample {samples}"


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in nested dicts, sequences, named tuples and dataclasses with its name."""
    if isinstance(value, Tensor):
        yield name or "output", value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}" if name else str(key))
    elif is_dataclass(value) and not isinstance(value, type):
        for key, item in vars(value).items():
            yield from _tensors(item, f"{name}.{key}" if name else key)
    elif isinstance(value, (list, tuple)):
        keys = getattr(value, "_fields", range(len(value)))
        for key, item in zip(keys, value, strict=True):
            yield from _tensors(item, f"{name}.{key}" if name else str(key))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, device) for item in value)
    return value
