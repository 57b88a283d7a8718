"""Training whose weights lie in parts on all ranks (FSDP2 through Lightning), with checkpoints that are whole files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2: weights, teacher, gradients and moments lie in parts, one on each rank.

    For encoders that do not fit a device; what fits trains faster under DDP. Losses and weights are those of DDP but
    for rounding. A checkpoint is one file like that of any other strategy, so a run may go on with another strategy or
    number of devices, and everything that reads checkpoints reads these: rank 0 holds it whole in host memory while it
    is written, each rank while it is read.

    Needs torch 2.6 or newer.

    Source: ours; Lightning's own saves a folder, or numbers the optimiser's state in another order than DDP does.

    Args:
        process_group_backend: nccl, gloo or None for what fits the device.
        timeout: of a single collective.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = timedelta(minutes=30)
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Start the process group, all ranks in one row."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole state on rank 0, on the CPU, and nothing on the others; called on every rank."""
        assert self.lightning_module is not None
        return dict(whole(self.lightning_module.state_dict(), self.is_global_zero))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the whole state on rank 0, on the CPU, and nothing on the others; called on every rank."""
        return dict(whole(optimizer.state_dict(), self.is_global_zero))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write the checkpoint as other strategies do."""
        super(ModelParallelStrategy, self).save_checkpoint(checkpoint, filepath, storage_options)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands over the optimiser's state too."""
        return True

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the checkpoint as other strategies do."""
        return super(ModelParallelStrategy, self).load_checkpoint(checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this rank's parts of a whole state."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        given = checkpoint["state_dict"]
        parts = {name: part_like(value, own[name]) if name in own else value for name, value in given.items()}
        self.lightning_module.load_state_dict(parts, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's parts of a whole state."""
        for optimizer, given in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: {name: part_like(value, parameters[number]) for name, value in entries.items()}
                for number, entries in given["state"].items()
            }
            optimizer.load_state_dict({**given, "state": state})


def refuse_other_sharding(strategy: Any) -> None:
    """Refuse Lightning's own sharding.

    Args:
        strategy: one, or its name on a command line.

    Raises:
        ValueError: naming what to use.
    """
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    by_name = isinstance(strategy, str) and name.rpartition(".")[2].startswith(("fsdp", "FSDP", "ModelParallel"))
    others = (FSDPStrategy, ModelParallelStrategy)
    if by_name or (isinstance(strategy, others) and not isinstance(strategy, ShardedStrategy)):
        raise ValueError(
            f"trainer.strategy is {name}, under which teacher and checkpoints were never tried; use "
            "agssd.sharding.ShardedStrategy, see conf/cluster/fsdp.yaml"
        )


def shard(module: nn.Module, parts: Sequence[nn.Module], forward: Sequence[str], mesh: DeviceMesh) -> None:
    """Spread the parameters of ``module`` over the ranks of ``mesh``, in place, starting from those of rank 0.

    Each of ``parts`` is gathered when its own forward pass begins and given up when it ends; everything else together,
    around the methods named in ``forward``, outside of which parameters are ``DTensor``.

    Args:
        module: on the device of the mesh.
        parts: modules inside it whose parameters are read in their own ``forward`` alone.
        forward: methods of ``module`` that return tensors a backward pass may start from.
        mesh: one row of ranks.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for tensor in chain(module.parameters(), module.buffers()):
        dist.broadcast(tensor.detach(), 0)
    for part in parts:
        fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)  # a validation leaves nothing gathered
    for name in forward:
        register_fsdp_forward_method(module, name)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Have every parameter at hand for forward passes outside a step; on every rank, which all do the same inside."""
    if not is_sharded(module):
        yield
        return
    root: Any = module  # torch changed its class
    root.unshard()
    try:
        yield
    finally:
        root.reshard()


@torch.no_grad()
def whole(state: Any, keep: bool = True) -> Any:
    """Return a nesting of tensors with every one whole and on the CPU; called on every rank.

    Args:
        state: any nesting; its tensors stay as they are.
        keep: False takes part and returns an empty dictionary, for ranks that do not need the result.
    """

    def gathered(tensor: Tensor) -> Tensor | None:
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return full.to("cpu") if keep else None

    found = apply_to_collection(state, Tensor, gathered)
    return found if keep else {}


def is_sharded(module: nn.Module) -> bool:
    """Return whether parameters of ``module`` lie in parts on several ranks."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def part_like(value: Any, like: Tensor) -> Any:
    """Return this rank's part of a whole tensor where ``like`` is one of that shape that lies in parts, else it."""
    from torch.distributed.tensor import distribute_tensor

    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
