"""Subcommands beside fit, validate, test and predict: one module each, found by name.

A command is a module (or package) ``agssd.commands.NAME`` with a one-line docstring for ``agssd --help`` and

- ``add_arguments(parser: argparse.ArgumentParser) -> None``,
- ``run(args: argparse.Namespace) -> int``, returning the exit code.

A command that looks at a training says ``TAKES_FIT = True``. It is then given the command line of ``agssd fit`` beside
its own options: ``args.of_fit`` is that list of words, and ``args.fit(*more)`` parses them (with more at their end,
``before=`` at their beginning) to a :class:`Fit`.

Adding a command is adding a file. This module imports none of them: help texts are read from the source, so that
``agssd --help`` stays fast whatever the commands need.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    import argparse

    import lightning.pytorch as L


class Command(Protocol):
    """What a module in this package offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do the work and return the exit code."""
        ...


class Fit(Protocol):
    """The command line of ``agssd fit``, parsed and refused as by ``fit``, of which nothing is built yet.

    Attributes:
        settings: the configuration, a jsonargparse Namespace.
        run_directory: of the run.
        model: after :meth:`build`.
        datamodule: after :meth:`build`.
    """

    settings: Any
    run_directory: Path
    model: Any
    datamodule: Any

    def build(self) -> None:
        """Make the model and the data module; nothing is read or written."""

    def build_trainer(self) -> L.Trainer:
        """Return the trainer, which connects to its devices, without callbacks and loggers."""
        ...


def _command_files() -> dict[str, Path]:
    here = Path(__file__).parent
    modules = {path.stem: path for path in here.glob("*.py")}
    packages = {path.parent.name: path for path in here.glob("*/__init__.py")}
    found = {**modules, **packages}
    return {name.replace("_", "-"): found[name] for name in sorted(found) if not name.startswith("_")}


def summaries() -> dict[str, str]:
    """Return the first line of the docstring of every command, by the name to type."""
    lines = {}
    for name, path in _command_files().items():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines[name] = text.partition("\n")[0]
    return lines


def exists(name: str) -> bool:
    """Return whether ``agssd NAME`` is a command of this package."""
    return name in _command_files()


def load(name: str) -> Command:
    """Import a command and only that one."""
    return cast(Command, import_module(f"{__name__}.{name.replace('-', '_')}"))
