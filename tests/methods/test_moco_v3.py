"""MoCo v3's step: which view meets which, and what the released code does in the forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import recipes
import torch
import torch.nn.functional as F

from agssd.methods.moco_v3 import MoCoV3


def test_moco_v3__is_the_symmetric_loss_of_algorithm_1(tiny_cache: Path) -> None:
    module = recipes.build(MoCoV3).eval()
    with torch.no_grad():  # else student and teacher agree but for the predictor
        for parameter in module.teacher.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    views = module.make_views(recipes.parents(tiny_cache, [0, 1, 2, 3]))
    queries, keys = [], []
    with torch.no_grad():
        for view in (0, 1):
            x = views.inputs[:, view]
            student, teacher = module.student, module.teacher
            queries.append(student["predictor"](student["projector"](student["backbone"](x).cls)))
            keys.append(teacher["projector"](teacher["backbone"](x).cls))
        expected = 0.0
        for query, key in ((queries[0], keys[1]), (queries[1], keys[0])):
            cosine = F.cosine_similarity(query[:, None], key[None], dim=-1)
            expected += 2 * 0.2 * F.cross_entropy(cosine / 0.2, torch.arange(4)).item()
        assert module.pretrain_loss(views).total.item() == pytest.approx(expected, rel=1e-5)


def test_moco_v3__forward_leaves_the_teacher_where_it_is(tiny_cache: Path) -> None:
    # Defect of the released code: the momentum update runs in every forward pass, thus once per micro-batch.
    module = recipes.build(MoCoV3)
    before = {name: tensor.clone() for name, tensor in module.teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in module.student.parameters():
            parameter.add_(1.0)
    for _ in range(2):
        module.pretrain_loss(module.make_views(recipes.parents(tiny_cache, [0, 1]))).total.backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in module.teacher.state_dict().items())


@pytest.mark.parametrize("frozen", [True, False])
def test_moco_v3__patch_embedding_is_trained_only_if_wanted(frozen: bool, tiny_cache: Path) -> None:
    module = recipes.build(MoCoV3, freeze_patch_embedding=frozen)
    before = module.student["backbone"].patch_weight.detach().clone()
    recipes.trainer(max_steps=2).fit(module, recipes.data_module(tiny_cache))
    assert torch.equal(module.student["backbone"].patch_weight, before) == frozen
    assert torch.equal(module.teacher["backbone"].patch_weight, before) == frozen
