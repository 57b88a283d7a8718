"""Whether torch can compute where a command is told to."""

from __future__ import annotations

import torch


def check_device(name: str) -> torch.device:
    """Return the device that ``--device`` names, once torch has computed on it.

    Raises:
        ValueError: if it cannot, with torch's reason.
    """
    if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {name}, but torch sees no CUDA device; use --device cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (AssertionError, ImportError, RuntimeError) as error:  # torch asserts where it was built without the device
        reason = " ".join(str(error).split()).partition(". ")[0][:250]
        raise ValueError(f"--device is {name}, where torch cannot compute ({reason}); use --device cpu") from error
    return device
