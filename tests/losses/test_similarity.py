"""The cosine distance against NumPy."""

from __future__ import annotations

import numpy as np
import torch

from agssd.losses.similarity import cosine_distance


def test_cosine_distance__is_the_squared_distance_of_unit_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(3, 5, 16, generator=generator) for _ in range(2))
    p, t = prediction.double().numpy(), target.double().numpy()
    p, t = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (p, t))
    np.testing.assert_allclose(cosine_distance(prediction, target).numpy(), ((p - t) ** 2).sum(-1), atol=1e-5)
    torch.testing.assert_close(cosine_distance(7 * prediction, prediction), torch.zeros(3, 5))
    torch.testing.assert_close(cosine_distance(-prediction, prediction), torch.full((3, 5), 4.0))


def test_cosine_distance__gives_the_target_no_gradient_and_small_half_vectors_a_direction() -> None:
    prediction = torch.tensor([[1e-4, 1e-4]], dtype=torch.float16, requires_grad=True)
    target = torch.tensor([[1.0, 0.0]], requires_grad=True)
    distance = cosine_distance(prediction, target)
    torch.testing.assert_close(distance.detach(), torch.tensor([2 - 2**0.5]), atol=2e-3, rtol=0)
    distance.sum().backward()
    assert prediction.grad is not None and prediction.grad.abs().min() > 0 and target.grad is None
