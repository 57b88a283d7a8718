"""Two gloo ranks compute what one process computes on the joined batch: values, centres and gradients."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from agssd.distributed import all_max, all_sum, gather_rows, world_size
from agssd.losses.distillation import Centre, sinkhorn
from agssd.losses.koleo import koleo
from agssd.models.heads import PrototypeHead

BATCH, TOKENS, PROTOTYPES, FEATURES = 8, 5, 24, 6


def material():
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(BATCH, TOKENS, PROTOTYPES, generator=generator) * 2 - 1
    weights = (torch.rand(BATCH, TOKENS, generator=generator) < 0.6).float()
    weights[BATCH // 2 :] = 0  # all that counts lies on the first rank in this one
    uneven = (torch.rand(BATCH, TOKENS, generator=generator) < 0.6).float()
    inputs = torch.randn(BATCH, FEATURES, generator=generator)
    inputs[6] = inputs[1]  # a duplicate on the other rank
    return logits, weights, uneven, inputs


def encoder() -> nn.Module:
    layer = nn.Linear(FEATURES, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(4, FEATURES, generator=torch.Generator().manual_seed(1)))
        layer.bias.fill_(0.1)
    return layer


def figures(rows: slice, wrap) -> dict[str, torch.Tensor]:
    """What a process with these rows of the batch finds; ``wrap`` makes a module data-parallel."""
    logits, weights, uneven, inputs = material()
    found: dict[str, torch.Tensor] = {"rank": torch.tensor(rows.start or 0), "world": torch.tensor(world_size())}
    for name, used in (("all", None), ("uneven", uneven), ("one rank", weights)):
        part = None if used is None else used[rows]
        found[f"sinkhorn {name}"] = sinkhorn(logits[rows], 0.07, part)
        for rule in ("mean", "balance"):
            centre = Centre(PROTOTYPES, 0.9, rule)
            for step in range(3):
                centre.targets(logits[rows] + 0.1 * step, 0.07, part, observe=True)
                centre.update()
            found[f"centre {rule} {name}"] = centre.centre
    torch.manual_seed(2)
    head = PrototypeHead(FEATURES, PROTOTYPES, 16, 8, centre_momentum=0.9)
    with torch.no_grad():
        head(inputs[rows], uneven[rows, 0])
    found["head mean"] = head.moved_mean()
    x = torch.arange(3.0) + (rows.start or 0)
    found["sum"], found["max"] = all_sum(x), all_max(x)

    model = wrap(encoder())
    features = model(inputs[rows])
    loss = koleo(features)
    # A second term that needs no gathering, as in training: both must come out right together.
    (0.1 * loss + features.square().mean()).backward()
    found["koleo"] = loss.detach()
    found["gathered"] = gather_rows(features).detach()
    found["weight gradient"], found["bias gradient"] = (p.grad for p in model.parameters())
    lone = wrap(encoder())
    single = koleo(lone(inputs[rows][:1]))  # one sample per rank still has a neighbour on the other
    single.backward()
    found["koleo of one per rank"] = single.detach()
    found["its gradient"] = next(lone.parameters()).grad
    return found


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        half = BATCH // 2
        found = figures(slice(rank * half, (rank + 1) * half), DistributedDataParallel)
        torch.save(found, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.ddp
def test_two_ranks__equal_one_process_on_the_joined_batch(tmp_path: Path):
    # This file as a script: a fork of a process that has run torch may hang, and a spawned one cannot import tests.
    ranks_running = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in ranks_running] == [0, 0]
    finally:
        for process in ranks_running:
            process.kill()
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    joined = figures(slice(None), lambda module: module)
    assert [int(found["world"]) for found in ranks] == [2, 2] and int(joined["world"]) == 1

    def close(got, wanted, name):
        torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-5, msg=lambda text: f"{name}: {text}")

    for name in ("all", "uneven", "one rank"):
        close(torch.cat([found[f"sinkhorn {name}"] for found in ranks]), joined[f"sinkhorn {name}"], name)
        for rule in ("mean", "balance"):
            for found in ranks:
                close(found[f"centre {rule} {name}"], joined[f"centre {rule} {name}"], f"{rule} {name}")
    for found in ranks:
        assert torch.equal(found["sum"], torch.tensor([4.0, 6.0, 8.0]))
        assert torch.equal(found["max"], torch.tensor([4.0, 5.0, 6.0]))
        for name in ("koleo", "gathered", "head mean", "weight gradient", "bias gradient"):
            close(found[name], joined[name], name)
    assert joined["weight gradient"].abs().max() > 0.1

    _, _, _, inputs = material()
    model = encoder()
    pair = koleo(model(inputs[[0, BATCH // 2]]))
    pair.backward()
    for found in ranks:
        close(found["koleo of one per rank"], pair.detach(), "one per rank")
        close(found["its gradient"], model.weight.grad, "gradient of one per rank")


def test_one_process__reductions_do_nothing_and_keep_the_graph():
    x = torch.ones(3, requires_grad=True)
    assert world_size() == 1
    for function in (all_sum, all_max, gather_rows):
        assert function(x) is x


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
