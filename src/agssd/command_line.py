"""What the command line of ``agssd fit`` may not say, refused before Lightning resolves it in silence."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace


def _options(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (name without dashes, value) of every option; the value of a flag without one is empty."""
    for position, argument in enumerate(args):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            follows = args[position + 1] if position + 1 < len(args) else ""
            yield name, value if equals else ("" if follows.startswith("--") else follows)


def refuse_repeated_cache(args: Sequence[str]) -> None:
    """Refuse ``--data.cache A --data.cache B``, of which the parser would keep only B.

    Raises:
        ValueError: with the form that keeps both.
    """
    caches = [value for name, value in _options(args) if name in ("data.cache", "data.init_args.cache")]
    if len(caches) > 1:
        raise ValueError(
            f"--data.cache is given {len(caches)} times and only the last would count; "
            f"name several caches at once: --data.cache [{','.join(caches)}]"
        )


def refuse_two_models(args: Sequence[str]) -> None:
    """Refuse two different model classes in one command: settings of the first would leak into the second.

    Where the class changes, the parser keeps the arguments that both classes have by name, so a mask ratio of one
    recipe would quietly become another's.

    Raises:
        ValueError: naming both classes and the remedy.
    """
    named: dict[str, str] = {}
    for option, value in _options(args):
        if option in ("config", "c") and Path(value).is_file():
            text = _load_yaml(Path(value))
            part = text.get("model") if isinstance(text, dict) else None
            chosen, source = _class_of(part, Path(value).parent), value
        elif option in ("model", "model.class_path"):
            chosen, source = _class_of(value, Path()), f"--{option} {value}"
        else:
            continue
        if chosen:
            named.setdefault(chosen, source)
    if len(named) > 1:
        (first, first_source), (second, second_source) = list(named.items())[:2]
        raise ValueError(
            f"two models are named: {first} ({first_source}) and {second} ({second_source}); settings of the first "
            "would leak into the second. Name one, for example --config conf/experiment/small.yaml --model "
            "conf/method/NAME.yaml"
        )


def _class_of(part: Any, folder: Path) -> str | None:
    """Return the class path that a ``model`` entry names directly or through a reference, or None."""
    if isinstance(part, str) and (folder / part).is_file():
        part = _load_yaml(folder / part)
    elif isinstance(part, str):
        return part or None
    return str(part["class_path"]) if isinstance(part, dict) and "class_path" in part else None


def _load_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from error


def refuse_missing_parts(config: Namespace) -> None:
    """Refuse a model that needs a backbone or views where the configuration names none at its top level.

    Raises:
        ValueError: saying where to state it.
    """
    module, _, name = config.model.class_path.rpartition(".")
    signature = inspect.signature(getattr(import_module(module), name))
    for name in ("backbone", "views"):
        parameter = signature.parameters.get(name)
        if parameter is not None and parameter.default is parameter.empty and config.get(name) is None:
            raise ValueError(
                f"{config.model.class_path} needs {name}; state it at the top level of the configuration, for example "
                f"{name}: ../{name}/NAME.yaml (inside model.init_args it would not be read)"
            )
