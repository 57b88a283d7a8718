"""Affine maps of views and the correspondence of tokens, exact for every pair of the 48 orientations."""

from __future__ import annotations

import math

import pytest
import torch

from agssd.geometry import (
    correspondence,
    invert,
    mutual_neighbours,
    num_rotations,
    overlap_grid,
    rotation_from_6d,
    rotation_matrices,
    sample_tokens,
    shrink_into_views,
    signed_permutations,
    token_centres,
    transform,
    view_affine,
)

ALL_PAIRS = torch.cartesian_prod(torch.arange(48), torch.arange(48))  # (2304, 2)


def affines(centre, edge, orientation, dtype=torch.float32):
    """Views of a parent of unit size, so that coordinates are of order 1."""
    table = signed_permutations().to(dtype)
    return view_affine(torch.as_tensor(centre, dtype=dtype), torch.as_tensor(edge, dtype=dtype), table[orientation])


def test_signed_permutations__are_the_48_distinct_symmetries_of_the_cube():
    table = signed_permutations()
    assert table.shape == (48, 3, 3)
    assert len({tuple(m.flatten().tolist()) for m in table}) == 48
    assert torch.equal(table.mT @ table, torch.eye(3).expand(48, 3, 3))
    assert torch.equal(table.abs().sum(-1), torch.ones(48, 3))
    assert (torch.linalg.det(table).round() == 1).sum() == 24
    products = {tuple(m.flatten().tolist()) for m in (table[:, None] @ table[None]).reshape(-1, 3, 3)}
    assert len(products) == 48  # a group


def test_signed_permutations__first_eight_flip_the_axes_of_their_binary_number():
    for index, matrix in enumerate(signed_permutations()[:8]):
        signs = [-1.0 if index & bit else 1.0 for bit in (4, 2, 1)]
        assert torch.equal(matrix, torch.diag(torch.tensor(signs)))


def test_rotation_matrices__are_rotations_and_turn_the_named_axis_planes():
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(50, 3, generator=generator, dtype=torch.float64) * 2 - 1
    rotation = rotation_matrices(angles)
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3, dtype=torch.float64).expand(50, 3, 3))
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(50, dtype=torch.float64))
    for axis in range(3):
        angle = torch.zeros(3, dtype=torch.float64)
        angle[axis] = 0.3
        single = rotation_matrices(angle)
        fixed = torch.eye(3, dtype=torch.float64)[axis]
        torch.testing.assert_close(single @ fixed, fixed)
        assert torch.trace(single).item() == pytest.approx(1 + 2 * math.cos(0.3))


def test_view_affine__puts_the_middle_at_the_centre_and_the_faces_half_an_edge_away():
    generator = torch.Generator().manual_seed(1)
    centre, edge = torch.rand(48, 3, generator=generator) * 50, torch.rand(48, 3, generator=generator) * 40 + 5
    affine = view_affine(centre, edge, signed_permutations())
    torch.testing.assert_close(transform(affine, torch.zeros(48, 1, 3))[:, 0], centre)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).expand(48, -1, -1)
    mapped = transform(affine, corners)
    torch.testing.assert_close(mapped.amin(1), centre - edge / 2)
    torch.testing.assert_close(mapped.amax(1), centre + edge / 2)


def test_invert__undoes_the_affine_with_rotation():
    generator = torch.Generator().manual_seed(2)
    centre, edge = torch.rand(48, 3, generator=generator) * 100, torch.rand(48, 3, generator=generator) * 80 + 10
    rotation = rotation_matrices(torch.rand(48, 3, generator=generator) - 0.5)
    affine = view_affine(centre, edge, signed_permutations(), rotation)
    points = torch.rand(48, 20, 3, generator=generator) * 2 - 1
    torch.testing.assert_close(transform(invert(affine), transform(affine, points)), points, atol=1e-5, rtol=0)


def test_token_centres__are_the_centres_grid_sample_reads_exactly():
    grid = (3, 4, 5)
    tokens = torch.arange(60, dtype=torch.float32).reshape(1, 60, 1)
    centres = token_centres(grid)
    torch.testing.assert_close(sample_tokens(tokens, grid, centres[None]), tokens, atol=1e-4, rtol=0)
    assert torch.allclose(centres[0], torch.tensor([1 / 3 - 1, 1 / 4 - 1, 1 / 5 - 1]))
    assert torch.allclose(centres[1] - centres[0], torch.tensor([0, 0, 2 / 5]), atol=1e-6)  # W is fastest


@pytest.mark.parametrize(("grid", "same_place"), [((6, 6, 6), False), ((4, 5, 3), False), ((4, 4, 4), True)])
def test_correspondence__reads_exact_coordinates_for_all_pairs_of_orientations(grid, same_place):
    generator = torch.Generator().manual_seed(3)
    pairs = len(ALL_PAIRS)
    centre_a = 0.4 + 0.2 * torch.rand(pairs, 3, generator=generator)
    edge_a = 0.4 + 0.3 * torch.rand(pairs, 3, generator=generator)
    centre_b = centre_a + 0.25 * (torch.rand(pairs, 3, generator=generator) - 0.5)
    edge_b = 0.4 + 0.3 * torch.rand(pairs, 3, generator=generator)
    if same_place:  # every token of A lies exactly on one of B: the outermost are at the limit of validity
        centre_b, edge_a = centre_a, edge_a[:, :1].expand(-1, 3)
        edge_b = edge_a
    affine_a = affines(centre_a, edge_a, ALL_PAIRS[:, 0])
    affine_b = affines(centre_b, edge_b, ALL_PAIRS[:, 1])
    centres = token_centres(grid).expand(pairs, -1, -1)
    wanted = transform(affine_a, centres)  # parent coordinates of A's tokens
    features = transform(affine_b, centres)  # parent coordinates of B's tokens, as features

    u_b, valid = correspondence(affine_a, affine_b, grid)
    read = sample_tokens(features, grid, u_b)

    assert valid.all() if same_place else 0.2 < valid.float().mean() < 0.9
    assert (read - wanted).abs().amax(-1)[valid].max() < 1e-5
    assert (transform(affine_b, u_b) - wanted).abs().max() < 1e-5  # also where B has nothing to read


@pytest.mark.parametrize(("margin", "least"), [(0.5, 1 / 8), (0.0, 0.0)])
def test_correspondence__valid_means_at_least_the_margin_inside(margin, least):
    grid = (4, 4, 4)
    generator = torch.Generator().manual_seed(4)
    centre, edge = torch.rand(64, 3, generator=generator), torch.rand(64, 3, generator=generator) + 0.5
    orientation = torch.randint(48, (2, 64), generator=generator)
    affine_a = affines(centre, edge, orientation[0])
    affine_b = affines(torch.full((64, 3), 0.5), torch.ones(64, 3), orientation[1])
    _, valid = correspondence(affine_a, affine_b, grid, margin)
    assert margin != 0.5 or torch.equal(valid, correspondence(affine_a, affine_b, grid)[1])
    points = transform(affine_a, token_centres(grid).expand(64, -1, -1))
    from_face = torch.minimum(points, 1 - points).amin(-1)  # distance to B's faces, B is the unit cube
    clear = (from_face - least).abs() > 1e-3
    assert torch.equal(valid[clear], (from_face > least)[clear])


def test_sample_tokens__interpolates_linear_fields_in_any_orientation_with_rotation():
    grid = (6, 6, 6)
    generator = torch.Generator().manual_seed(5)
    orientation = torch.arange(48)
    rotation = rotation_matrices(0.4 * (torch.rand(48, 3, generator=generator) - 0.5))
    centre, edge = torch.full((48, 3), 0.5), torch.full((48, 3), 0.6)
    affine_b = view_affine(centre, edge, signed_permutations()[orientation], rotation)
    affine_a = affines(centre + 0.03, edge * 0.8, orientation.flip(0))
    centres = token_centres(grid).expand(48, -1, -1)
    u_b, valid = correspondence(affine_a, affine_b, grid)
    read = sample_tokens(transform(affine_b, centres), grid, u_b)
    assert valid.float().mean() > 0.5
    assert (read - transform(affine_a, centres)).abs().amax(-1)[valid].max() < 1e-5


def test_overlap_grid__names_the_same_parent_points_in_both_views():
    generator = torch.Generator().manual_seed(6)
    orientation = torch.randint(48, (2, 100), generator=generator)
    low = torch.rand(100, 3, generator=generator) * 10
    affine_a = view_affine(low + 10, torch.full((100, 3), 20.0), signed_permutations()[orientation[0]])
    affine_b = view_affine(low + 18, torch.full((100, 3), 24.0), signed_permutations()[orientation[1]])
    box = torch.stack([low + 6, low + 20], -1)  # A spans low .. low + 20, B low + 6 .. low + 30
    u_a, u_b = overlap_grid(affine_a, affine_b, box, 4)
    torch.testing.assert_close(transform(affine_a, u_a), transform(affine_b, u_b), atol=1e-4, rtol=0)
    assert u_a.abs().max() < 1 and u_b.abs().max() < 1
    points = transform(affine_a, u_a)
    torch.testing.assert_close(points.mean(1), low + 13, atol=1e-4, rtol=0)
    pitch = 14 / 4
    torch.testing.assert_close(points.amin(1), low + 6 + pitch / 2, atol=1e-4, rtol=0)


def test_correspondence__is_the_same_under_autocast() -> None:
    generator = torch.Generator().manual_seed(3)
    centre = torch.rand(8, 3, generator=generator) * 40
    a, b = (
        view_affine(centre + shift, torch.full((8, 3), 24.0), signed_permutations()[5].expand(8, 3, 3))
        for shift in (0.0, 7.3)
    )
    expected = correspondence(a, b, (6, 6, 6))
    with torch.autocast("cpu", torch.bfloat16):
        given = correspondence(a, b, (6, 6, 6))
    assert torch.equal(given[0], expected[0])
    assert torch.equal(given[1], expected[1])


def test_rotation_from_6d__keeps_rotations_and_makes_one_of_any_two_vectors() -> None:
    generator = torch.Generator().manual_seed(4)
    rotations = rotation_matrices(torch.rand(50, 3, generator=generator) * 6)
    columns = torch.cat([rotations[..., 0], rotations[..., 1]], -1)
    torch.testing.assert_close(rotation_from_6d(columns), rotations, atol=1e-5, rtol=0)
    torch.testing.assert_close(rotation_from_6d(columns * 7), rotations, atol=1e-5, rtol=0)
    made = rotation_from_6d(torch.randn(50, 6, generator=generator))
    torch.testing.assert_close(made @ made.mT, torch.eye(3).expand(50, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(made), torch.ones(50))


@pytest.mark.parametrize("grid", [(4, 4, 4), (3, 5, 2)])
def test_mutual_neighbours__of_one_place_seen_twice_are_the_same_points_for_all_pairs_of_orientations(grid) -> None:
    pairs = ALL_PAIRS if len(set(grid)) == 1 else ALL_PAIRS[(ALL_PAIRS < 8).all(1)]  # quarter turns need cubes
    centre, edge = torch.tensor([5.0, 7.0, 9.0]).expand(len(pairs), 3), torch.tensor([8.0, 10.0, 9.0])
    first, second = (affines(centre, edge.expand(len(pairs), 3), pairs[:, k]) for k in (0, 1))
    partner, mutual, inside = mutual_neighbours(first, second, grid)
    assert mutual.all() and inside.all()
    coordinates = [transform(affine, token_centres(grid).expand(len(pairs), -1, -1)) for affine in (first, second)]
    found = coordinates[1].gather(1, partner[..., None].expand(-1, -1, 3))
    torch.testing.assert_close(found, coordinates[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rotated", [False, True])
def test_mutual_neighbours__are_those_of_a_search_over_all_distances(rotated: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    count, grid = 300, (4, 3, 5)
    edge = 20 * (0.5 + torch.rand(2, count, 3, generator=generator))
    centre = 25 + 12 * torch.rand(2, count, 3, generator=generator)
    table = signed_permutations()[torch.randint(8, (2, count), generator=generator)]
    rotation = rotation_matrices(0.4 * torch.rand(2, count, 3, generator=generator)) if rotated else None
    first, second = view_affine(centre, edge, table, rotation)
    partner, mutual, inside = mutual_neighbours(first, second, grid)
    a, b = (transform(affine, token_centres(grid).expand(count, -1, -1)) for affine in (first, second))
    distance = torch.cdist(a.double(), b.double())
    inside_b, inside_a = (
        (torch.linalg.solve(other.double(), torch.cat([points, torch.ones_like(points[..., :1])], -1).double().mT)
         .abs().amax(1) <= 1)
        for other, points in ((second, a), (first, b))
    )  # fmt: skip
    assert torch.equal(inside, inside_b)
    nearest, back = distance.argmin(2), distance.argmin(1)
    assert torch.equal(partner[inside], nearest[inside])
    rows = torch.arange(len(nearest[0]))
    expected = (back.gather(1, nearest) == rows) & inside & inside_a.gather(1, nearest)
    assert torch.equal(mutual, expected) and 0.02 < mutual.float().mean() < 0.5
    for chosen, found in zip(mutual, partner, strict=True):
        assert len(found[chosen].unique()) == chosen.sum()  # one to one
    again, other_way, _ = mutual_neighbours(second, first, grid)
    assert other_way.sum() == mutual.sum()


@pytest.mark.parametrize("dims", [2, 3])
def test_shrink_into_views__is_the_largest_box_of_its_proportions_that_lies_in_every_view(dims):
    generator = torch.Generator().manual_seed(dims)
    centre = 20 + 3 * torch.rand(200, 2, dims, generator=generator)
    edge = 10 + 8 * torch.rand(200, 2, dims, generator=generator)
    low, high = (centre - edge / 2).amax(1), (centre + edge / 2).amin(1)
    box = torch.stack([low, high], -1)
    table = signed_permutations(dims=dims)
    orientation = table[torch.randint(len(table), (200, 2), generator=generator)]
    plain = view_affine(centre - 0.5, edge, orientation)
    found, fits = shrink_into_views(box, plain)
    assert fits.all()
    torch.testing.assert_close(found, box, rtol=0, atol=1e-4)

    angles = 0.6 * torch.rand(200, 2, num_rotations(dims), generator=generator) - 0.3
    turned = view_affine(centre - 0.5, edge, orientation, rotation_matrices(angles))
    found, fits = shrink_into_views(box, turned)
    share = (found[..., 1] - found[..., 0]) / (high - low)
    torch.testing.assert_close(share, share[:, :1].expand(-1, dims))
    torch.testing.assert_close(found.mean(-1), box.mean(-1))
    corners = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5])] * dims)
    for factor, inside in ((0.999, True), (1.001, False)):
        points = found.mean(-1)[:, None] + factor * corners * (found[..., 1] - found[..., 0])[:, None]
        u = transform(invert(turned), (points - 0.5)[:, None].expand(-1, 2, -1, -1))
        assert ((u.abs() <= 1).all((1, 2, 3)) == inside)[fits & (share[:, 0] < 1)].all()
    assert fits.float().mean() > 0.9 and (share[:, 0] < 0.95).float().mean() > 0.5
    _, fits = shrink_into_views(box + 2 * edge.amax(1)[..., None], turned)
    assert not fits.any()
