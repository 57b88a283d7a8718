"""Marks: short words that change with the settings and the data of a run, so that an old result is known as one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from agssd.data_modules.cache import VolumeCache


def fingerprint(value: Any) -> str:
    """Return 12 hex digits of a value in plain types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def command_mark(words: Sequence[str]) -> str:
    """Return 12 hex digits that change with a command line or with what the YAML files say that it leads to."""
    return fingerprint(with_contents(list(words)))


def with_contents(value: Any) -> Any:
    """Return a value in plain types with what YAML files say in place of their names."""
    if isinstance(value, dict):
        return {key: with_contents(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_contents(item) for item in value]
    return contents(Path(value)) if names_yaml(value) else value


def cache_mark(cache: VolumeCache, with_labels: bool = True) -> str:
    """Return 12 hex digits that change with the cases of a cache, their splits and preparation; not with its place.

    Without labels they change with what pretraining reads alone, so that labels can be corrected after it.

    Of label maps in caches of early versions only the values count: a map corrected with the values it had changes
    nothing here.
    """
    cases = [case.to_json() for case in cache.cases]
    for case in cases:
        if not with_labels or case["label_sha256"] is None:  # an early cache keeps the mark that it had
            del case["label_sha256"]
    return fingerprint([cases, list(cache.class_names)])


def contents(path: Path) -> Any:
    """Return what a YAML file says, with what other files say in place of their names; the path where there is none."""

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [filled(item) for item in value]
        inner = path.parent / value if names_yaml(value) else None
        return contents(inner) if inner is not None and inner.is_file() else value

    return filled(_parsed(path, path.stat().st_mtime_ns)) if path.is_file() else str(path)


def file_mark(path: Path) -> str:
    """Return 12 hex digits that change with what a file holds, weights for example; of its name where there is none."""
    if not path.is_file():
        return fingerprint(str(path))
    state = path.stat()
    return _digest(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=256)
def _digest(path: Path, changed: int, size: int) -> str:
    """Return the mark of a file; ``changed`` and ``size`` say when it is to be read again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


@lru_cache(maxsize=256)
def _parsed(path: Path, changed: int) -> Any:
    """Return what a file says; ``changed`` is when it was written, since hundreds of cells name the same files."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def names_yaml(value: Any) -> bool:
    """Return whether a word is the name of a YAML file."""
    return isinstance(value, str) and value.endswith((".yaml", ".yml"))
