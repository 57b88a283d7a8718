"""Groups of label values, by which a map of many structures becomes one of few classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

LabelGroups = tuple[tuple[int, ...], ...]
_MAX = int(np.iinfo(np.int16).max)


def read_label_groups(path: Path) -> LabelGroups:
    """Return the groups in a YAML or JSON file, in its order: the n-th becomes class n, values in none background.

    The file maps a name to a list of values, such as ``kidneys: [2, 3]``; names are for the reader.

    Raises:
        ValueError: naming what is wrong.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--label-groups {path} cannot be read: {error}") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f"--label-groups {path} holds no groups; give lines such as `kidneys: [2, 3]`")
    group_of: dict[int, str] = {}
    for name, values in found.items():
        if not isinstance(values, list) or not values:
            raise ValueError(
                f"--label-groups {path}: {name} is {values!r}; give a list of label values, such as [2, 3]"
            )
        for value in values:
            if type(value) is not int or not 1 <= value <= _MAX:
                raise ValueError(f"--label-groups {path}: {name} holds {value!r}; values are 1 to {_MAX}")
            if value in group_of:
                raise ValueError(f"--label-groups {path}: {value} is in {group_of[value]} and in {name}")
            group_of[value] = str(name)
    return tuple(tuple(values) for values in found.values())


def grouped(label: NDArray[np.integer], groups: LabelGroups) -> NDArray[np.uint8 | np.int16]:
    """Return class n where a label map holds a value of the n-th group, 0 elsewhere, in the same shape.

    Args:
        label: values from 0 to 32767.
        groups: from :func:`read_label_groups`.
    """
    table = np.zeros(_MAX + 1, np.uint8 if len(groups) < 256 else np.int16)
    for number, values in enumerate(groups, start=1):
        table[list(values)] = number
    classes: NDArray[np.uint8 | np.int16] = table[label]
    return classes
