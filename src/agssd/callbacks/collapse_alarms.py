"""The alarms of the collapse monitor: figures in, sentences out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

TERMS = ("cls", "patch")
HARD = frozenset(
    [
        "non_finite",
        "teacher_ranks",
        *(f"{term}_{kind}" for term in TERMS for kind in ("uniform", "peaked", "features_lost")),
    ]
)  # names of the alarms that mean a lost run
# Sample entropy, as a share of ln K, above which it is chance which prototype is the largest.
_NEARLY_UNIFORM = 0.9
_PEAKED_REMEDY = "make the views differ more, enlarge the batch or use Sinkhorn instead of centring"


class Alarm(NamedTuple):
    """One finding: a stable name, whether it means a lost run, the sentence for people, and what to lower first."""

    name: str
    hard: bool
    sentence: str
    lower: Literal["temperature", "lr"] = "lr"


@dataclass
class CollapseAlarms:
    """Compares figures with their limits; see :class:`~agssd.callbacks.collapse_monitor.CollapseMonitor` for each.

    ``uniform_since`` is the only memory: the step since when a term has been uniform.
    """

    grace: float
    uniform_margin: float
    uniform_steps: int
    min_entropy_batch: float
    max_share: float
    min_information: float
    min_feature_std: float
    soft_rank: float
    hard_rank: float
    max_cosine: float
    min_distance: float
    max_gradient_ratio: float
    max_fused_gain: float
    uniform_since: dict[str, int] = field(default_factory=dict)

    def diagnose(self, figures: dict[str, float], num_prototypes: dict[str, int], step: int, total: int) -> list[Alarm]:
        """Return the alarms that stand at ``step`` of ``total``.

        Args:
            figures: by name without the ``collapse/`` prefix.
            num_prototypes: K of each term that has outputs.
            step: optimiser steps done.
            total: optimiser steps of the run.
        """
        broken = [name for name, value in figures.items() if not math.isfinite(value)]
        if broken:
            sentence = (
                f"not finite: {', '.join(broken)}; resume from the checkpoint before, with a lower learning rate, "
                "and prefer bf16 over fp16"
            )
            return [Alarm("non_finite", True, sentence)]
        alarms = self._teacher(figures) + self._balance(figures)
        for term in TERMS:
            own = {key.removeprefix(f"{term}_"): value for key, value in figures.items() if key.startswith(f"{term}_")}
            if "cross_entropy" in own and self._is_uniform(term, own, num_prototypes[term], step):
                alarms += self._uniform(term, num_prototypes[term], step, total)
            elif "cross_entropy" in own:
                alarms += self._outputs(term, own)
            if "effective_rank" in own:
                alarms += self._features(term, own)
        return alarms if step >= self.grace * total else []

    @staticmethod
    def _teacher(figures: dict[str, float]) -> list[Alarm]:
        if figures.get("teacher_rank_gap", 0.0) > 0:
            sentence = (
                f"the teachers of the ranks differ (by {figures['teacher_rank_gap']:.3g} in the norm of weights), so "
                "each rank trains on other targets; start the ranks from one checkpoint"
            )
            return [Alarm("teacher_ranks", True, sentence)]
        if figures.get("teacher_distance", 1.0) == 0:
            sentence = (
                "the teacher equals the student, so targets are the student's own; raise ema_teacher.momentum_start"
            )
            return [Alarm("teacher_equal", False, sentence)]
        return []

    def _balance(self, figures: dict[str, float]) -> list[Alarm]:
        alarms = []
        if figures.get("grad_norm_ratio", 0.0) > self.max_gradient_ratio:
            norms = {name: value for name, value in figures.items() if name.startswith("grad_norm_")}
            del norms["grad_norm_ratio"]
            told = ", ".join(f"{name.removeprefix('grad_norm_')} {value:.3g}" for name, value in norms.items())
            sentence = (
                f"one loss term decides alone: gradients at the encoder differ {figures['grad_norm_ratio']:.3g} times "
                f"(limit {self.max_gradient_ratio:g}; {told}); lower the weight of the largest"
            )
            alarms.append(Alarm("gradient_ratio", False, sentence))
        if figures.get("cvaa_gap_share", 0.0) > self.max_fused_gain:
            sentence = (
                f"fusion takes {figures['cvaa_gap_share']:.0%} off the patch loss (limit {self.max_fused_gain:.0%}): "
                "the fuser copies hidden tokens from the other view; raise model.counterpart_drop"
            )
            alarms.append(Alarm("fuser_copies", False, sentence))
        margin = figures.get("cosine_corresponding", 1.0) - figures.get("cosine_random", 0.0)
        if margin <= 0:
            sentence = (
                f"tokens of one place in two views are no more alike than others (cosines differ by {margin:.3f}); "
                "look at the view panels, and lower the learning rate"
            )
            alarms.append(Alarm("correspondence_lost", False, sentence))
        return alarms

    def _is_uniform(self, term: str, figures: dict[str, float], prototypes: int, step: int) -> bool:
        uniform = abs(figures["cross_entropy"] - math.log(prototypes)) < self.uniform_margin
        if uniform:
            self.uniform_since.setdefault(term, step)
        else:
            self.uniform_since.pop(term, None)
        return uniform

    def _uniform(self, term: str, prototypes: int, step: int, total: int) -> list[Alarm]:
        steps = step - self.uniform_since[term]
        limit = min(self.uniform_steps, total // 10)
        if steps < limit:
            return []
        sentence = (
            f"{term} cross-entropy has stayed within {self.uniform_margin} of ln K = {math.log(prototypes):.4f} for "
            f"{steps} steps (limit {limit}), so the outputs are uniform; lower the teacher temperature first, then the "
            "learning rate"
        )
        return [Alarm(f"{term}_uniform", True, sentence, "temperature")]

    def _outputs(self, term: str, figures: dict[str, float]) -> list[Alarm]:
        if figures["entropy_batch"] < self.min_entropy_batch:
            sentence = (
                f"{term} entropy of the mean teacher output is {figures['entropy_batch']:.3f} of ln K (limit "
                f"{self.min_entropy_batch}), so samples share a few prototypes; {_PEAKED_REMEDY}"
            )
            return [Alarm(f"{term}_peaked", True, sentence)]
        if figures["max_share"] > self.max_share and figures["entropy_sample"] < _NEARLY_UNIFORM:
            sentence = (
                f"{term} has {figures['max_share']:.0%} of the samples on one prototype (limit {self.max_share:.0%}); "
                f"{_PEAKED_REMEDY}"
            )
            return [Alarm(f"{term}_peaked", True, sentence)]
        if figures["information"] < self.min_information:
            sentence = (
                f"{term} targets tell samples apart by {figures['information']:.4f} of ln K (limit "
                f"{self.min_information}); lower the teacher temperature, or give crops that show different anatomy"
            )
            return [Alarm(f"{term}_uninformative", False, sentence)]
        return []

    def _features(self, term: str, figures: dict[str, float]) -> list[Alarm]:
        rank, cosine, spread = figures["effective_rank"], figures["cosine"], figures["feature_std"]
        if rank < self.hard_rank or cosine > self.max_cosine:
            sentence = (
                f"{term} features have effective rank {rank:.1f} (limit {self.hard_rank:g}) and mean cosine "
                f"{cosine:.4f} (limit {self.max_cosine}), so samples look alike; go back to an earlier "
                "checkpoint with a lower learning rate or teacher temperature"
            )
            return [Alarm(f"{term}_features_lost", True, sentence)]
        alarms: list[Alarm] = []
        if figures.get("min_distance", 1.0) < self.min_distance:
            sentence = (
                f"two samples have the same {term} features (distance {figures['min_distance']:.1e}, limit "
                f"{self.min_distance:g}), which KoLeo pushes apart without bound; look for constant crops and "
                "duplicate scans with `agssd doctor`"
            )
            alarms.append(Alarm(f"{term}_duplicates", False, sentence))
        if rank < self.soft_rank:
            sentence = (
                f"{term} features have effective rank {rank:.1f} (limit {self.soft_rank:g}); raise the weight of "
                "KoLeo, enlarge the batch or use more varied volumes"
            )
            alarms.append(Alarm(f"{term}_low_rank", False, sentence))
        if spread < self.min_feature_std:
            sentence = (
                f"{term} features have a spread of {spread:.2f} (1 is isotropic, limit {self.min_feature_std}); raise "
                "the weight of KoLeo or lower the learning rate"
            )
            alarms.append(Alarm(f"{term}_low_spread", False, sentence))
        return alarms
