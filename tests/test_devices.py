"""A device that torch cannot compute on is refused by its name, by every command that takes one."""

from __future__ import annotations

import pytest
import torch

from agssd.cli import main
from agssd.devices import check_device


def test_check_device__one_that_computes__is_returned() -> None:
    assert check_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "meta", "hpu"])
def test_check_device__one_that_does_not__named_with_a_remedy(name: str) -> None:
    with pytest.raises(ValueError, match=f"^--device is {name}, .*use --device cpu$"):
        check_device(name)


@pytest.mark.parametrize(
    "words",
    [
        ["probe", "no.h5", "--random"],
        ["report", "no", "--out", "no.html"],
        ["bench-speed", "--rounds", "1"],
    ],
)
def test_commands__device_that_is_none__refused_before_anything_is_read(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--device", "gpu"]) == 1
    assert "--device is gpu, where torch cannot compute" in capsys.readouterr().err
