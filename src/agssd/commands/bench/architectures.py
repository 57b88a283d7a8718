"""The encoder that a method pretrains, held against the one that a readout compares it with: one architecture or none.

A readout whose decoder starts from another network than the one that was pretrained fails after the pretraining, and a
probe would compare it with random weights of another size.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from agssd.commands.bench.processes import said_to
from agssd.models.backbone import build_fresh
from agssd.run.directory import plain_config
from agssd.tasks.finetuning import architecture

if TYPE_CHECKING:
    from agssd.commands.bench.cells import Cell

PLACES = ("--trainer.default_root_dir", "--model.encoder")


def without_places(words: Sequence[str], gone: Sequence[str] = PLACES) -> list[str]:
    """Return a command line without flags, and what they are given, that name a run directory or an encoder."""
    kept, skipped = [], False
    for word in words:
        if skipped or word in gone:
            skipped = not skipped and word in gone
        else:
            kept.append(word)
    return kept


def same_encoder(cells: Sequence[Cell], backbone: str | None) -> dict[str, Any]:
    """Hold what methods pretrain against what readouts name, and return how long it took.

    Args:
        cells: of methods that the bench pretrains.
        backbone: YAML of the random weights that probes compare with.

    Raises:
        ValueError: naming a method and a readout that differ, and both encoders.
    """
    started = time.perf_counter()
    known: dict[tuple[str, ...], Any] = {}
    for cell in cells:
        assert cell.pretraining is not None
        one = _named(cell.pretraining.command, known)
        other = _named(cell.fit, known) if cell.fit else _said(Path(str(backbone)))
        if one is None or other is None:
            continue
        pretrained, other = _built(json.dumps(one)), _built(json.dumps(other))
        if pretrained != other:
            raise ValueError(
                f"{cell.method} pretrains an encoder that is not the one of {cell.readout}: "
                f"{_differences(pretrained, other)}; let pretrain, fit and backbone name one"
            )
    return {"seconds": time.perf_counter() - started}


def refuse_another(encoder: dict[str, Any], folder: Path, backbone: Path) -> None:
    """Refuse an encoder that is there and is not of the architecture of the random weights beside it.

    Raises:
        ValueError: naming both.
    """
    found, expected = architecture(encoder), _built(json.dumps(_said(backbone)))
    if found != expected:
        raise ValueError(
            f"the encoder in {folder} is not the one of {backbone}, whose random weights it is compared with: "
            f"{_differences(found, expected)}"
        )


def _named(words: Sequence[str], known: dict[tuple[str, ...], Any]) -> Any:
    """Return the encoder that a command line names; None where it names none, or is refused, which ``build`` tells."""
    kept = tuple(without_places(words))
    if kept not in known:
        with tempfile.TemporaryDirectory() as folder, said_to(Path(folder) / "log.txt"):
            try:
                fit = import_module("agssd.lightning_cli").ParsedFit(kept[1:], Path(folder))
                known[kept] = plain_config(fit.parser, fit.config)[str(fit.subcommand)].get("backbone")
            except (Exception, SystemExit):
                known[kept] = None
    return known[kept]


def _differences(one: dict[str, Any], other: dict[str, Any]) -> str:
    if one["class_path"] != other["class_path"]:
        return f"{one['class_path']} instead of {other['class_path']}"
    here, there = one["init_args"], other["init_args"]
    names = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    return ", ".join(f"{name} {here.get(name)} instead of {there.get(name)}" for name in names)


def _said(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@lru_cache(maxsize=16)
def _built(config: str) -> dict[str, Any]:
    """Return the architecture of a configuration in JSON, with every default said."""
    return architecture(build_fresh(json.loads(config)).config)
