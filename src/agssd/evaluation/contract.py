"""Whether data were prepared as an encoder expects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_contract(
    expected: dict[str, Any] | None, found: dict[str, Any], encoder: str | None, override: str | None
) -> None:
    """Refuse data that were prepared differently from what the encoder was trained on.

    Args:
        expected: contract of the encoder; None (from scratch) accepts everything.
        found: contract of the data module.
        encoder: path of the encoder, for the message.
        override: the flag that switches this check off, for the message; None where there is none.

    Raises:
        ValueError: naming every difference and the remedy.
    """
    if not expected:
        return
    differences, remedies = [], []
    want, have = expected.get("spacing_mm"), found.get("spacing_mm")
    if want and have and any(abs(a - b) > 0.01 * a for a, b in zip(want, have, strict=True)):
        differences.append(f"spacing {_numbers(have)} mm instead of {_numbers(want)} mm")
        remedies.append(f"prepare the scans again with --spacing-mm {' '.join(f'{value:g}' for value in want)}")
    if expected.get("channels") not in (None, found.get("channels")):
        differences.append(f"{found.get('channels')} channels instead of {expected['channels']}")
        remedies.append(f"use an encoder of in_channels {found.get('channels')}")
    if expected.get("orientation") not in (None, found.get("orientation")):
        differences.append(f"orientation {found.get('orientation')} instead of {expected['orientation']}")
        remedies.append("prepare the scans again")
    modality = expected.get("modality")
    if modality not in (None, "mixed", found.get("modality")):
        differences.append(f"modality {found.get('modality')} instead of {modality}")
        remedies.append(f"choose cases with --data.modality {modality}, or an encoder of the other modality")
    else:
        rules = expected.get("intensity") or {}
        for name, rule in (found.get("intensity") or {}).items():
            if name in rules and rules[name] != rule:
                differences.append(f"intensity of {name} {rule} instead of {rules[name]}")
                remedies.append("prepare the scans again with this version")
    if differences:
        raise ValueError(
            f"the cache does not fit the encoder {encoder or ''}: {'; '.join(differences)}. Remedy: "
            f"{'; '.join(remedies)}" + ("" if override is None else f"; or accept it knowingly with {override}")
        )


def _numbers(values: Sequence[float]) -> str:
    return "x".join(f"{value:g}" for value in values)
