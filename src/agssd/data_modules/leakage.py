"""Whether an encoder has seen subjects or scans that a downstream task validates or tests on.

A pretraining run records whom it trained on: digests of subject keys and perceptual hashes of scans, as text that goes
into its checkpoints and with the contract into exports. The record names nobody: a subject key is a salted hash
already, and its digest can only be compared. 100 000 cases make a record of 10 MB.
"""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agssd.data_modules.cache import CaseInfo, VolumeCache
from agssd.scans.preparing.perceptual import MAX_DISTANCE, NUM_BITS, near_duplicates, single_hashes

_LOG = logging.getLogger(__name__)
_DIGEST_BYTES = 8
_HASH_BYTES = NUM_BITS // 8
Policy = Literal["error", "warn"]
_REMEDY = (
    "Pretrain on the split 'train' of the same cache (for folds with the same data.num_folds and data.fold), measure "
    "on other cases, or accept it knowingly with --data.leakage warn"
)
Row = tuple[int, int]  # cache, case


def seen_record(caches: Sequence[VolumeCache], rows: Sequence[Row]) -> dict[str, Any]:
    """Return what tells later whether a case was trained on, in plain types.

    Keys: ``num_cases``; ``num_subjects``; ``salts``, the fingerprints of the salts of the subject keys, None among them
    where one is not known; ``subjects`` and ``hashes``, base64 of sorted distinct digests of 8 bytes and perceptual
    hashes of 64 bytes.
    """
    infos = [caches[cache].cases[case] for cache, case in rows]
    salts = {caches[cache].salt_fingerprint for cache, _ in rows}
    digests = {_digest(caches[cache].salt_fingerprint, caches[cache].cases[case].subject) for cache, case in rows}
    hashes = {piece for info in infos for piece in single_hashes(info.perceptual_hash)}
    return _record(len(rows), salts, digests, hashes)


def record_after(
    contract: Mapping[str, Any] | None, caches: Sequence[VolumeCache], rows: Sequence[Row]
) -> dict[str, Any] | None:
    """Return the record of an encoder that is trained further: what it had seen, and the cases ``rows``.

    A case of both counts twice in ``num_cases``.

    Args:
        contract: of the encoder before; None for fresh weights.
        caches: of the further training.
        rows: its cases.

    Returns:
        None where nobody knows what the encoder had seen.
    """
    two = seen_record(caches, rows)
    if contract is None:
        return two
    one = contract.get("seen")
    if one is None:
        return None
    return _record(
        one["num_cases"] + two["num_cases"],
        {*one["salts"], *two["salts"]},
        _pieces(one["subjects"], _DIGEST_BYTES) | _pieces(two["subjects"], _DIGEST_BYTES),
        _pieces(one["hashes"], _HASH_BYTES) | _pieces(two["hashes"], _HASH_BYTES),
    )


@dataclass(frozen=True)
class Overlap:
    """What of some cases an encoder has seen.

    Attributes:
        num_subjects: subjects among the cases.
        num_cases: cases.
        subjects: keys of the subjects seen, sorted.
        duplicates: key of each further case that is a near duplicate of one seen, with the bits that differ.
    """

    num_subjects: int
    num_cases: int
    subjects: tuple[str, ...]
    duplicates: dict[str, int]

    def __bool__(self) -> bool:
        """Return whether anything was seen."""
        return bool(self.subjects or self.duplicates)

    def __str__(self) -> str:
        """Return counts and an example of each kind."""
        return self._told(examples=True)

    @property
    def counts(self) -> str:
        """Counts without keys, for what is published."""
        return self._told(examples=False)

    def _told(self, examples: bool) -> str:
        parts = []
        if self.subjects:
            example = f" (for example {self.subjects[0]})" if examples else ""
            parts.append(f"{len(self.subjects)} of {self.num_subjects} subjects{example}")
        if self.duplicates:
            key, bits = next(iter(self.duplicates.items()))
            example = (
                f" (for example case {key}: {bits} of the {NUM_BITS} bits of its perceptual hash differ, and up to "
                f"{MAX_DISTANCE} do in copies)"
            )
            more = "further " if self.subjects else ""
            parts.append(
                f"near duplicates of {len(self.duplicates)} {more}of {self.num_cases} scans{example * examples}"
            )
        return " and ".join(parts)


def overlap(seen: Mapping[str, Any], caches: Sequence[VolumeCache], rows: Sequence[Row]) -> Overlap:
    """Return what of the cases ``rows`` is in the record ``seen``.

    Subjects are the same if both key and salt are; keys of unknown salts (caches of early versions) count as of one
    salt, since equal keys of different salts do not occur.
    """
    infos = [(caches[cache].salt_fingerprint, caches[cache].cases[case]) for cache, case in rows]
    digests = _pieces(seen["subjects"], _DIGEST_BYTES)
    known = {info.subject for salt, info in infos if _digest(salt, info.subject) in digests}
    others: list[CaseInfo] = [info for _, info in infos if info.subject not in known]
    hashes = [piece.hex() for piece in sorted(_pieces(seen["hashes"], _HASH_BYTES))]
    duplicates: dict[str, int] = {}
    for row, _, bits in near_duplicates([info.perceptual_hash for info in others], hashes):
        duplicates[others[row].key] = min(bits, duplicates.get(others[row].key, NUM_BITS))
    subjects = {info.subject for _, info in infos}
    return Overlap(len(subjects), len(rows), tuple(sorted(known)), duplicates)


def check_leakage(
    contract: Mapping[str, Any] | None,
    encoder: str,
    caches: Sequence[VolumeCache],
    splits: Mapping[str, Sequence[Row]],
    policy: Policy,
    remedy: str = _REMEDY,
) -> str:
    """Refuse, or warn of, an encoder that has seen cases to be validated or tested on.

    What could not be compared is said in one warning: an encoder without a record, other or unknown salts, no hashes.

    Args:
        contract: of the encoder; None for fresh weights, which have seen nothing.
        encoder: where it comes from, for the message.
        caches: of the downstream task.
        splits: the cases of "val" and "test".
        policy: "error" or "warn".
        remedy: what the error advises.

    Returns:
        What was seen, in counts, and what could not be compared; nothing where all was compared and nothing seen.

    Raises:
        ValueError: under "error", naming counts, split, an example and the remedy.
    """
    rows = [row for part in splits.values() for row in part]
    if contract is None or not rows:
        return ""
    seen = contract.get("seen")
    if seen is None:
        _LOG.warning(
            "%s carries no record of the cases that it was trained on (an early version or another program made it), "
            "so whether any of them is in val or test could not be checked",
            encoder,
        )
        return "not checked, since the encoder carries no record of what it has seen"
    if gap := _gap(seen, caches, rows):
        _LOG.warning("the check of %s for cases of val and test is incomplete: %s", encoder, gap)
    found = {name: overlap(seen, caches, part) for name, part in splits.items()}
    told = "; ".join(f"of the split {name!r} {part}" for name, part in found.items() if part)
    incomplete = f"incompletely checked: {gap}" if gap else ""
    if not told:
        return incomplete
    message = f"{encoder} has been trained on cases that figures would be measured on: {told}"
    if policy == "error":
        raise ValueError(f"{message}. {remedy}")
    _LOG.warning("%s; figures on them say nothing about new patients", message)
    seen_of = "; ".join(f"of the split {name!r} {part.counts}" for name, part in found.items() if part)
    return "; ".join(filter(None, (f"seen {seen_of}", incomplete)))


def _gap(seen: Mapping[str, Any], caches: Sequence[VolumeCache], rows: Sequence[Row]) -> str:
    """Return why some cases cannot be compared, or nothing."""
    reasons = []
    salts = {caches[cache].salt_fingerprint for cache, _ in rows} | set(seen["salts"])
    if None in salts or len(salts) > 1:
        reasons.append(
            "subject keys were made with different or unknown salts (prepare the caches with one salt file, "
            "`agssd prepare --salt FILE`)"
        )
    without = sum(caches[cache].cases[case].perceptual_hash is None for cache, case in rows)
    if without or not seen["hashes"]:
        reasons.append(
            f"{without} of {len(rows)} scans of val and test" + ("" if seen["hashes"] else " and all that it has seen")
        )
        reasons[-1] += " have no perceptual hash (prepare early caches again; very thin or flat scans have none)"
    return " and ".join(reasons)


def _record(num_cases: int, salts: Iterable[str | None], subjects: set[bytes], hashes: set[bytes]) -> dict[str, Any]:
    return {
        "num_cases": num_cases,
        "num_subjects": len(subjects),
        "salts": sorted(salts, key=str),
        "subjects": base64.b64encode(b"".join(sorted(subjects))).decode(),
        "hashes": base64.b64encode(b"".join(sorted(hashes))).decode(),
    }


def _pieces(text: str, size: int) -> set[bytes]:
    data = base64.b64decode(text)
    return {data[start : start + size] for start in range(0, len(data), size)}


def _digest(salt: str | None, subject: str) -> bytes:
    return hashlib.sha256(f"{salt or ''}/{subject}".encode()).digest()[:_DIGEST_BYTES]
