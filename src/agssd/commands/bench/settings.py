"""What a bench compares: the YAML of ``agssd bench``, checked."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from agssd.commands.bench.marks import fingerprint, names_yaml, with_contents

Labels = int | str | float
Probe = Literal["linear-seg", "knn-seg", "knn-cls", "linear-cls"]  # those of `agssd probe`
EQUAL_TIME = "-equal-time"  # what the name of a method's second pretraining ends in
_NAME = re.compile(r"[\w.+-]+")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")


@dataclass
class Method:
    """One row of the comparison.

    Args:
        pretrain: command line of ``agssd fit`` without cache, seeds and run directory; empty means random weights.
        encoders: in place of ``pretrain``, what was pretrained elsewhere, such as on many GPUs: exports, checkpoints or
            run directories, one for each seed, in YAML relative to the file.
        steps: optimiser steps of pretraining, None for those of the bench; more or fewer for equal time.
        fit: for a network of its own the command line of each readout that it takes part in, in place of the readout's;
            empty takes part in all, and ``scratch`` always does.
        time_of: the method whose second pretraining this is, of as many steps as fit into the time of
            ``Bench.equal_time``; set by the bench.
    """

    pretrain: list[str] = field(default_factory=list)
    encoders: list[str] = field(default_factory=list)
    steps: int | None = None
    fit: dict[str, list[str]] = field(default_factory=dict)
    time_of: str | None = None

    @property
    def pretrained(self) -> bool:
        """Whether it starts from anything but random weights."""
        return bool(self.pretrain or self.encoders)


@dataclass
class Readout:
    """One way to ask what an encoder is worth: a task trained on few labels and measured on whole volumes.

    Either ``fit`` with ``steps``, or ``probe``.

    Args:
        fit: command line of ``agssd fit`` of a task without cache, encoder, labels, seeds, steps and run directory.
        steps: budgets of optimiser steps; each is a run of its own, since the schedule ends with it.
        probe: a readout of ``agssd probe``, fitted to frozen features at its own settings: neighbours or linear, of
            tokens (dice) or of volumes (accuracy).
        window_vox: of those features, (D, H, W) in voxels, the size of view in pretraining; benches are of volumes.
        depths: of those features: the encoder's tokens, or "all", four depths side by side.
        labels: amounts of labels for this readout, where each costs much; None takes those of the bench.
        seeds: how many pretrainings this readout is of, where each costs much; None, or more than those of the bench,
            takes those.
        equal_time: whether the second pretrainings of ``Bench.equal_time`` take part.
    """

    fit: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    probe: Probe | None = None
    window_vox: list[int] = field(default_factory=list)
    depths: Literal["last", "all"] = "last"
    labels: list[Labels] | None = None
    seeds: int | None = None
    equal_time: bool = True

    @property
    def budgets(self) -> list[int]:
        """The steps of each column group; of a probe one of 0, since it trains no network."""
        return self.steps if self.probe is None else [0]


@dataclass
class Bench:
    """A comparison: methods x readouts x budgets x labels x draws x seeds x folds.

    Args:
        methods: by name; one without ``pretrain`` and ``encoders`` is trained from random weights, such as ``scratch``,
            which is always there.
        readouts: by name.
        labels: counts of labelled subjects ("4") and shares of them ("25%"); all labels are "100%".
        pretrain_steps: optimiser steps of every pretraining.
        seeds: how many pretrainings of each method, and initialisations of those without one.
        draws: how many draws of the labelled subjects; subsets of one draw are nested. All labels are drawn once.
        num_folds: measure on folds by subject inside the split ``train``, which pretraining leaves out too; None
            measures on the split ``test``.
        figure: "dice" of segmentation or "accuracy" (balanced) of classification.
        equal_time: a method with ``pretrain``. Every other one gets a second pretraining, NAME-equal-time, of as many
            steps as fit into the time that the steps of this one took with the same seed and fold. The clock of
            ``throughput/s_per_step`` counts: without start, probes and validation.
        lead: the pretrained method that is held against every other one, as all are against ``scratch``; None takes
            the first of ``methods``.
        num_classes: of the tasks, with background for segmentation; None leaves what their YAML says.
        backbone: YAML of the encoder, for ``scratch`` and its like in readouts that are a ``probe``.
        pretrain_common: words at the end of every ``pretrain``.
        fit_common: words at the end of every ``fit``.
        threads: of torch in each process.

    Raises:
        ValueError: for names, labels or numbers that cannot serve.
    """

    methods: dict[str, Method]
    readouts: dict[str, Readout]
    labels: list[Labels]
    pretrain_steps: int
    seeds: int = 3
    draws: int = 5
    num_folds: int | None = None
    figure: Literal["dice", "accuracy"] = "dice"
    equal_time: str | None = None
    lead: str | None = None
    num_classes: int | None = None
    backbone: str | None = None
    pretrain_common: list[str] = field(default_factory=list)
    fit_common: list[str] = field(default_factory=list)
    threads: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot serve."""
        for kind, names in (("method", self.methods), ("readout", self.readouts)):
            if bad := [name for name in names if not _NAME.fullmatch(name)]:
                raise ValueError(f"the {kind} {bad[0]!r} is to be a folder's name: letters, digits, and ._+-")
        if "scratch" not in self.methods or self.methods["scratch"].pretrained:
            raise ValueError("methods has no 'scratch: {}', the network without pretraining that all are held against")
        for name, method in self.methods.items():
            if unknown := set(method.fit) - set(self.readouts):
                raise ValueError(
                    f"methods.{name}.fit names {sorted(unknown)}; the readouts are {sorted(self.readouts)}"
                )
            if method.encoders and (method.pretrain or method.steps is not None):
                raise ValueError(f"methods.{name} has encoders, and pretrain or steps beside them; give one of both")
            if method.encoders and len(method.encoders) < self.seeds:
                raise ValueError(
                    f"methods.{name}.encoders are {len(method.encoders)} for {self.seeds} seeds; give one for each, "
                    "from pretrainings that differ by their seed, or ask for fewer seeds"
                )
        numbers = {"pretrain_steps": self.pretrain_steps, "seeds": self.seeds, "draws": self.draws}
        numbers |= {
            f"readouts.{name}.steps": min(one.steps, default=0)
            for name, one in self.readouts.items()
            if one.probe is None
        }
        numbers |= {f"readouts.{name}.seeds": one.seeds for name, one in self.readouts.items() if one.seeds is not None}
        numbers |= {f"methods.{name}.steps": m.steps for name, m in self.methods.items() if m.steps is not None}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; give at least 1")
        if self.num_folds is not None and self.num_folds < 2:
            raise ValueError(f"num_folds is {self.num_folds}; give at least 2, or null for the split test")
        self.labels = _amounts("labels", self.labels)
        for name, one in self.readouts.items():
            if one.labels is not None:
                one.labels = _amounts(f"readouts.{name}.labels", one.labels)
            if one.probe is not None:
                self._check_probe(name, one)
        self.methods = self._with_equal_time()
        pretrained = [name for name, method in self.methods.items() if method.pretrained]
        if self.lead is not None and self.lead not in pretrained:
            raise ValueError(f"lead is {self.lead!r}; name a method that is pretrained: {', '.join(pretrained)}")

    def _check_probe(self, name: str, one: Readout) -> None:
        kind = "seg" if self.figure == "dice" else "cls"
        if one.fit or one.steps:
            raise ValueError(f"readouts.{name} has fit or steps and is a probe; give one of both")
        if one.probe is not None and not one.probe.endswith(kind):
            raise ValueError(
                f"readouts.{name}.probe is {one.probe}, but {self.figure} is that of a probe ending in {kind}"
            )
        if len(one.window_vox) != 3:
            raise ValueError(
                f"readouts.{name}.window_vox is {one.window_vox}; give the size of view, such as [32, 32, 32]"
            )
        if self.backbone is None:
            raise ValueError(f"readouts.{name} is a probe; name the encoder of scratch by backbone: YAML")
        trained = [self.fit_common, *(one.fit for one in self.readouts.values())]
        if any("--data.label_groups" in words for words in trained):
            raise ValueError(
                f"readouts.{name} is a probe, which takes labels as they are stored, but --data.label_groups is given "
                "to fit; group them by `agssd prepare --label-groups` instead"
            )
        if users := [method for method, its in self.methods.items() if name in its.fit]:
            raise ValueError(f"methods.{users[0]}.fit names {name}, which is a probe and trains no network")

    def _with_equal_time(self) -> dict[str, Method]:
        """Return the methods, each other than ``equal_time`` followed by its second pretraining."""
        if self.equal_time is None:
            return self.methods
        if self.equal_time not in self.methods or not self.methods[self.equal_time].pretrain:
            raise ValueError(f"equal_time is {self.equal_time!r}; name a method with pretrain")
        found: dict[str, Method] = {}
        for name, method in self.methods.items():
            found[name] = method
            if method.pretrain and name != self.equal_time and method.time_of is None:
                twin = replace(method, steps=None, time_of=name)
                if self.methods.get(name + EQUAL_TIME, twin) != twin:
                    raise ValueError(
                        f"methods.{name + EQUAL_TIME} is the name of what equal_time makes; choose another"
                    )
                found[name + EQUAL_TIME] = twin
        return found

    @property
    def leader(self) -> str | None:
        """The method that is held against every other one; None where nothing is pretrained."""
        return self.lead or next((name for name, method in self.methods.items() if method.pretrained), None)

    def labels_of(self, readout: str) -> list[Labels]:
        """Return the amounts of labels of a readout."""
        own = self.readouts[readout].labels
        return self.labels if own is None else own

    def seeds_of(self, readout: str) -> int:
        """Return how many pretrainings a readout is of."""
        return min(self.readouts[readout].seeds or self.seeds, self.seeds)

    def takes_part(self, method: str, readout: str) -> bool:
        """Return whether a method is measured by a readout."""
        its = self.methods[method]
        own = bool(its.fit) and method != "scratch"
        return (not own or readout in its.fit) and (its.time_of is None or self.readouts[readout].equal_time)

    def draws_of(self, labels: Labels) -> int:
        """Return how many draws of an amount there are: of all labels just one."""
        return 1 if labels == "100%" else self.draws

    def fingerprint(self) -> str:
        """Return 12 hex digits that change with any setting, or with what the YAML files say that settings lead to."""
        return fingerprint(with_contents(asdict(self)))


def amount(labels: Labels) -> tuple[int | None, float | None]:
    """Return an amount of labels as a count of subjects or a share of them."""
    return (labels, None) if isinstance(labels, int) else (None, float(str(labels).rstrip("%")) / 100)


def label_flags(labels: Labels) -> list[str]:
    """Return the flags of the data module for an amount of labels."""
    count, share = amount(labels)
    if count is not None:
        return ["--data.num_subjects", str(count)]
    return [] if share == 1 else ["--data.label_fraction", f"{share:g}"]


def read_settings(path: Path, quick: bool) -> Bench:
    """Return the bench in a YAML file; encoders and words that name a YAML are paths relative to it.

    A file may lay itself over others: ``base: OTHER.yaml``, or a list in which the later is over the earlier.

    Args:
        path: of the file.
        quick: lay what stands under ``quick`` over the rest.

    Raises:
        ValueError: naming what is wrong and where.
    """
    from jsonargparse import ArgumentParser

    found = _loaded(path)
    smaller = found.pop("quick", None)
    if quick and smaller is None:
        raise ValueError(f"{path} says nothing under 'quick'")
    settings = _laid(found, smaller) if quick else found
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Bench)
    try:
        return bench_of(parser.parse_object(settings).as_dict())
    except Exception as error:  # jsonargparse raises several kinds
        raise ValueError(f"{path}: {str(error).strip()}") from error


def _loaded(path: Path) -> dict[str, Any]:
    """Return what a file says, laid over its base, with paths in place of words that name a YAML."""
    if not path.is_file():
        raise ValueError(f"there is no bench {path}; run from the repository, or name one as conf/bench/NAME.yaml")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings of a bench")
    found = _resolved(path.parent, found)
    bases = found.pop("base", [])
    below: dict[str, Any] = {}
    for above in [*map(_loaded, map(Path, [bases] if isinstance(bases, str) else bases)), found]:
        smaller = _over(below.pop("quick", None), above.pop("quick", None) or {}, keep_none=True)
        below = _laid(below, above) | ({"quick": smaller} if smaller else {})
    return below


def bench_of(plain: dict[str, Any]) -> Bench:
    """Return the settings that ``dataclasses.asdict`` made plain."""
    methods = {name: Method(**entry) for name, entry in plain.pop("methods").items()}
    readouts = {name: Readout(**entry) for name, entry in plain.pop("readouts").items()}
    return Bench(methods, readouts, **plain)


def _laid(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return settings laid over others; a readout that is taken out is taken out of ``scratch`` too."""
    joined = cast(dict[str, Any], _over(below, above))
    own = ((joined.get("methods") or {}).get("scratch") or {}).get("fit")
    gone = [name for name, one in (above.get("readouts") or {}).items() if one is None]
    if isinstance(own, dict):
        joined["methods"]["scratch"]["fit"] = {name: words for name, words in own.items() if name not in gone}
    return joined


def _over(below: Any, above: Any, keep_none: bool = False) -> Any:
    """Return ``above`` laid over ``below``: dictionaries are joined, anything else is replaced; None removes.

    With ``keep_none`` a None stays, to remove something from what the result is laid over later.
    """
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    joined = {
        key: _over(below.get(key), above[key], keep_none) if key in above else below[key] for key in {**below, **above}
    }
    return {key: value for key, value in joined.items() if value is not None or keep_none or key not in above}


def _resolved(folder: Path, value: Any) -> Any:
    """Return settings in which encoders and words that name a YAML, relative to ``folder`` before, are paths."""
    if isinstance(value, dict):
        found = {key: _resolved(folder, item) for key, item in value.items()}
        if isinstance(given := value.get("encoders"), list):
            found["encoders"] = [os.path.normpath(folder / str(one)) for one in given]
        return found
    if isinstance(value, list):
        return [_resolved(folder, item) for item in value]
    if names_yaml(value) and not Path(value).is_absolute():
        return os.path.normpath(folder / value)
    return value


def _amounts(name: str, given: Sequence[Labels]) -> list[Labels]:
    amounts = [_label(name, value) for value in given]
    if not amounts or len(set(amounts)) < len(amounts):
        raise ValueError(f"{name} is {amounts}; give each amount once, such as [2, 8, 100%]")
    return amounts


def _label(name: str, value: Labels) -> Labels:
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    if isinstance(value, int) and value >= 1:
        return value
    found = _PERCENT.fullmatch(str(value).strip())
    if found is None or not 0 < float(found[1]) <= 100:
        raise ValueError(f"{name} has {value!r}; give a count of subjects such as 4, or a share such as 25%")
    return f"{float(found[1]):g}%"
