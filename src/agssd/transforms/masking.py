"""EAAM: edge-aware adaptive masking, and the plainer masks it is compared with, in one batched draw.

Source: AG-SSD's abstract names masking that prefers patches with strong edges [paper]; the easy-to-hard quota follows
AnatoMask [R: AnatoMask], the hints, off by default, AttMask-hint [R: AttMask]; Gumbel-top-k with an annealed
temperature, exact counts and the background rules are ours (docs/method.md §1.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor

from agssd.geometry import axis_names, constant, sizes_of
from agssd.schedules import linear
from agssd.transforms.edges import entropy_scores, patch_scores, standardise
from agssd.transforms.keyed_random import KeyedRandom
from agssd.types import Size

MaskScore = Literal["random", "block", "edge", "region", "entropy", "attention", "loss"]
MAP_SCORES = ("edge", "region")  # of the voxels of a map
TEACHER_SCORES = ("attention", "loss")  # what only a teacher can tell; the recipe brings them

BACKGROUND_WEIGHT = 0.2  # of a background token in the random quota
# Edges as shares of the grid (ours). On average 32 such cuboids cover 0.90 of 6³ tokens; the rest is filled at random.
_CUBOIDS, _CUBOID_EDGES = 32, (0.25, 0.6)


def mask_counts(ratio: Tensor, grid: Size, block: int) -> Tensor:
    """Return (B,) int64: hidden blocks per sample, ``round(ratio * N / block**d)``, at least 1."""
    blocks = math.prod(_coarse_grid(grid, block))
    return (ratio * blocks).round().long().clamp(1, blocks)


def _take(keys: Tensor, count: Tensor) -> Tensor:
    """Return (B, N) bool: the ``count`` (B,) largest keys of each row that are above minus infinity."""
    order = keys.argsort(1, descending=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(keys.shape[1], device=keys.device).expand_as(order))
    return (rank < count[:, None]) & (keys > -torch.inf)


def draw_masks(
    scores: Tensor,
    foreground: Tensor,
    grid: Size,
    ratio: Tensor,
    edge_share: float,
    temperature: float,
    hint_share: float,
    random: KeyedRandom,
    block: int = 1,
) -> Tensor:
    """Draw masks that prefer high scores, with an exact count.

    Of the ``k`` hidden blocks a share ``edge_share`` is drawn without replacement with probability proportional to
    ``exp(score / temperature)`` among foreground blocks, the rest uniformly (background with weight 0.2). Then
    ``hint_share`` of the blocks that this draw has hidden of the top tenth of the scores are shown again, and as many
    drawn uniformly from the foreground are hidden instead, so the count stays ``k``.

    Args:
        scores: (B, N) float32, z-scores; all 0 (a flat volume) makes the edge quota uniform over the foreground.
        foreground: (B, N) bool, tokens that hold body.
        grid: token grid, every axis a multiple of ``block``.
        ratio: (B,) float32, share of hidden tokens.
        edge_share: share of the hidden blocks drawn by score, in [0, 1].
        temperature: of the draw; large is uniform.
        hint_share: of the blocks of the top tenth that are drawn by score, rounded; 0 switches hints off. Not of all
            hidden blocks: a tenth of those is most of the top tenth, and edges are then hidden less than the rest.
        random: keyed by the B samples.
        block: tokens per side of a hidden block.

    Returns:
        (B, *grid) bool, True = hidden; exactly ``mask_counts(ratio, grid, block) * block**d`` True per sample.

    Raises:
        ValueError: if ``block`` does not divide the grid.
    """
    coarse = _coarse_grid(grid, block)
    blocks = math.prod(coarse)
    score = _pool(scores, grid, block).mean(-1)
    body = _pool(foreground.float(), grid, block).amax(-1) > 0  # (B, M)
    score = score.masked_fill(~body, -torch.inf)
    count = mask_counts(ratio, grid, block)

    available = body.sum(1)
    by_score = _take(
        score / temperature + random.gumbel(blocks), torch.minimum((edge_share * count).round().long(), available)
    )
    weight = torch.where(body, 1.0, BACKGROUND_WEIGHT).log()
    uniform = (weight + random.gumbel(blocks)).masked_fill(by_score, -torch.inf)
    hidden = by_score | _take(uniform, count - by_score.sum(1))

    if hint_share > 0:
        # A flat volume has no strongest patches; the order of its ties must not show the same places every time.
        varied = (body & (score != 0)).any(1, keepdim=True)
        top = _take(score, (torch.full_like(count, blocks) * 0.1).ceil().long()) & varied
        strongest = by_score & top
        hints = _take(
            random.uniform(blocks).masked_fill(~strongest, -torch.inf), (hint_share * strongest.sum(1)).round().long()
        )
        # A hint needs a foreground block to hide in its place.
        spare = random.uniform(blocks).masked_fill(hidden | ~body, -torch.inf)
        exchanged = torch.minimum(hints.sum(1), (spare > -torch.inf).sum(1))
        hints = _take(random.uniform(blocks).masked_fill(~hints, -torch.inf), exchanged)
        hidden = (hidden & ~hints) | _take(spare, exchanged)
    return _spread(hidden, coarse, block)


def draw_cuboids(grid: Size, ratio: Tensor, random: KeyedRandom, block: int = 1) -> Tensor:
    """Draw masks as unions of random cuboids, with an exact count: the last cuboid is hidden in part.

    Source: block-wise masks of BEiT and iBOT [R: iBOT], in 3D cuboids; the exact count is ours.

    Args:
        grid: token grid.
        ratio: (B,) float32.
        random: keyed by the B samples.
        block: tokens per side of the unit that is hidden as a whole.

    Returns:
        (B, *grid) bool, True = hidden, same count as :func:`draw_masks`.
    """
    coarse = _coarse_grid(grid, block)
    size = constant(coarse, ratio.device)
    edge = (size * random.between(*_CUBOID_EDGES, _CUBOIDS, len(coarse))).ceil()
    start = ((size - edge + 1) * random.uniform(_CUBOIDS, len(coarse))).floor()  # (B, M, d)
    covered = torch.ones((), dtype=torch.bool, device=ratio.device)
    for axis, length in enumerate(coarse):
        index = torch.arange(length, device=ratio.device)
        inside = (index >= start[..., axis, None]) & (index < (start + edge)[..., axis, None])  # (B, M, n)
        covered = covered & inside.reshape(*inside.shape[:2], *(length if a == axis else 1 for a in range(len(coarse))))
    covered = covered.expand(ratio.shape[0], _CUBOIDS, *coarse).flatten(2)
    first = torch.where(covered.any(1), covered.float().argmax(1), _CUBOIDS)  # (B, n): the cuboid that hides a token
    hidden = _take(-first + random.uniform(covered.shape[2]), mask_counts(ratio, grid, block))
    return _spread(hidden, coarse, block)


class MaskSampler:
    """Draws the masks of a recipe's views: at random, in cuboids, or easy to hard by a score of each patch.

    The share of hidden tokens drawn by score rises from 0 to ``score_share`` over the run, and the temperature of that
    draw goes from the first to the second of ``temperature``, linear in its logarithm.

    Args:
        grid: token grid of a view.
        patch: voxels of a token.
        score: ``"random"``; ``"block"`` for unions of cuboids; or what is preferred: ``"edge"`` (strong edges),
            ``"region"`` (boundaries between the regions of region maps; ours), ``"entropy"`` (of the intensities of a
            patch) [R: arXiv 2605.21970], ``"attention"`` (of the teacher's [CLS] to the whole view) [R: AttMask],
            ``"loss"`` (what the teacher predicts badly) [R: AnatoMask].
        block: tokens per side of a hidden block.
        score_share: share of the hidden tokens drawn by score at the end of the run.
        temperature: first and last.
        hints: share of the strongest tenth of patches, as far as drawn by score, that is shown after all.

    Raises:
        ValueError: if ``block`` does not divide the grid, or a temperature is not above 0.
    """

    def __init__(
        self,
        grid: Size,
        patch: Size,
        score: MaskScore = "random",
        block: int = 1,
        score_share: float = 0.5,
        temperature: tuple[float, float] = (4.0, 1.0),
        hints: float = 0.0,
    ) -> None:
        _coarse_grid(grid, block)
        if min(temperature) <= 0:
            raise ValueError(f"mask_temperature is {tuple(temperature)}; give numbers above 0, (4, 1) say")
        self.grid = grid
        self.patch = patch
        self.score = score
        self.block = block
        self._per_block: int = block ** len(grid)  # tokens
        self.score_share = score_share
        self.temperature = temperature
        self.hints = hints

    def schedules(self, progress: float) -> dict[str, float]:
        """Return share and temperature of the draw by score at a share of the run."""
        hot, cold = self.temperature
        return {
            "mask_edge_share": linear(progress, 0.0, self.score_share),
            "mask_temperature": hot * (cold / hot) ** progress,
        }

    def scores(self, body: Tensor, image: Tensor, edges: Tensor | None, given: Tensor | None = None) -> Tensor:
        """Return (B, N) z-scores over the patches that hold body; 0 for flat volumes and where no score is used."""
        if self.score in TEACHER_SCORES:
            assert given is not None, "the recipe brings its teacher's scores"
            return given
        if self.score in MAP_SCORES:
            assert edges is not None, "the recipe asks for the map where it is the score"
            return standardise(patch_scores(edges, self.patch), body)
        if self.score == "entropy":
            return standardise(entropy_scores(image, self.patch), body)
        return torch.zeros_like(body, dtype=torch.float32)

    def draw(
        self,
        random: KeyedRandom,
        ratio: Tensor,
        progress: float,
        body: Tensor,
        image: Tensor,
        edges: Tensor | None = None,
        given: Tensor | None = None,
    ) -> Tensor:
        """Return masks (B, *grid) bool, True = hidden, with an exact count; see :func:`draw_masks`.

        Args:
            random: keyed by the B views.
            ratio: (B,) float32, share of hidden tokens.
            progress: share of the run that is done.
            body: (B, N) bool, patches that hold body.
            image: (B, C, [D,] H, W) float32, the clean views.
            edges: (B, 1, [D,] H, W) their edge maps, for ``score="edge"``, or boundaries of regions for ``"region"``.
            given: (B, N) float32 z-scores of the teacher, for ``"attention"`` and ``"loss"``.
        """
        if self.score == "block":
            return draw_cuboids(self.grid, ratio, random, self.block)
        now, by_score = self.schedules(progress), self.score != "random"
        share, hints = (now["mask_edge_share"], self.hints) if by_score else (0.0, 0.0)
        scores = self.scores(body, image, edges, given)
        return draw_masks(scores, body, self.grid, ratio, share, now["mask_temperature"], hints, random, self.block)

    def error_by_halves(self, random: KeyedRandom, error: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return (B, N): the error at every patch, each predicted while a random half of the view is hidden.

        Source: loss-guided masks [R: AnatoMask]; two complementary halves of whole blocks, so that every patch is
        predicted once and from as much as any other, are ours.

        Args:
            random: keyed by the B views.
            error: (B, M) float32 at the hidden patches, of a mask (B, *grid) bool, True = hidden, and their positions
                (B, M) int64.
        """
        coarse = _coarse_grid(self.grid, self.block)
        blocks = math.prod(coarse)
        order = random.uniform(blocks).argsort(1)
        half = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, : blocks // 2], True)
        found = torch.zeros(len(order), math.prod(self.grid), device=order.device)
        for hidden, count in ((half, blocks // 2), (~half, blocks - blocks // 2)):
            mask = _spread(hidden, coarse, self.block)
            index, _ = masked_indices(mask.flatten(1), count * self._per_block)
            found = found.scatter(1, index, error(mask, index))
        return found

    def limit(self, ratio: float) -> int:
        """Return at least the number of hidden tokens of a view of which the share ``ratio`` or less is hidden."""
        # Not round(): in float32 a half may round the other way, and a hidden token would miss the loss.
        return max(1, math.ceil(ratio * (math.prod(self.grid) // self._per_block))) * self._per_block

    def exact(self, ratio: float) -> int:
        """Return the number of hidden tokens of a view of which the share ``ratio`` is hidden."""
        return int(mask_counts(torch.tensor([ratio]), self.grid, self.block)) * self._per_block


def one_ratio(mask_ratio: tuple[float, float]) -> float:
    """Return the only share of hidden tokens of a recipe that leaves them out of its encoder.

    Raises:
        ValueError: if it is a range: all samples must show equally many tokens.
    """
    low, high = mask_ratio
    if low != high:
        raise ValueError(
            f"mask_ratio is ({low}, {high}), but hidden tokens are left out of the encoder, so all samples must hide "
            "equally many: give the same number twice (with the callback: --mask_ratio.kind constant); AG-SSD takes a "
            "range with student_views masked or both"
        )
    return low


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Return (B, M, E): tokens (B, N, E) at positions (B, M)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def masked_indices(mask: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Return the positions of hidden tokens in a fixed shape, so that heads run on them alone without a host sync.

    Args:
        mask: (B, N) bool.
        limit: at least the largest number of hidden tokens of a sample.

    Returns:
        ``index`` (B, limit) int64, hidden positions first and in raster order, and ``used`` (B, limit) bool.
    """
    order = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)[:, :limit]
    return order, mask.gather(1, order)


def _coarse_grid(grid: Size, block: int) -> Size:
    if block < 1 or any(n % block for n in grid):
        raise ValueError(f"mask_block is {block}, which does not divide the token grid {grid}; choose a divisor")
    return tuple(n // block for n in grid)


def _pool(values: Tensor, grid: Size, block: int) -> Tensor:
    """Return (B, M, block**d): tokens of each block."""
    cells, within, whole = axis_names(len(grid))
    sizes = sizes_of(within, (block,) * len(grid))
    pooled: Tensor = rearrange(values.unflatten(1, grid), f"n {whole} -> n ({cells}) ({within})", **sizes)
    return pooled


def _spread(hidden: Tensor, coarse: Size, block: int) -> Tensor:
    cells, within, whole = axis_names(len(coarse))
    sizes = sizes_of(within, (block,) * len(coarse))
    spread: Tensor = repeat(hidden.reshape(-1, *coarse), f"n {cells} -> n {whole}", **sizes)
    return spread
