"""Entry levels: exact counts, nesting, patterns, and scores compared with NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestify.model.entry_levels import EntryLevels
from nestify.recipe.level_options import Score
from nestify.recipe.levels import Level, Pattern, parse_pattern
from nestify.schedule.weights import layer_budgets, select_entry_levels

SCORES: list[Score] = ["fisher", "lamp", "magnitude", "per_mac", "uniform", "erk"]

shapes = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 12), st.integers(1, 12)),
        st.tuples(st.integers(1, 8), st.integers(1, 6), st.just(3), st.just(3)),
    ),
    min_size=1,
    max_size=4,
)
sparsities = st.lists(st.floats(0, 0.99), min_size=2, max_size=4, unique=True).map(
    lambda values: sorted(values, reverse=True)
)


def make_weights(sizes: list[tuple[int, ...]], seed: int, distinct: int | None) -> dict[str, torch.Tensor]:
    """Return random weights: normal, or of `distinct` different values, so that there are many ties."""
    rng = np.random.default_rng(seed)
    draw = (lambda s: rng.normal(size=s)) if distinct is None else (lambda s: rng.integers(0, distinct, s))
    return {f"layer{i}.weight": torch.tensor(draw(size), dtype=torch.float32) for i, size in enumerate(sizes)}


def make_levels(values: list[float], pattern: Pattern | None = None) -> list[Level]:
    return [Level(f"l{i}", value, pattern or Pattern()) for i, value in enumerate(values)]


def make_macs(weights: dict[str, torch.Tensor]) -> dict[str, int]:
    """Return MACs of weights that multiply 1, 4, 16 or 49 times each."""
    return {name: w.numel() * (16, 1, 49, 4)[i] for i, (name, w) in enumerate(weights.items())}


def is_nested(entry: EntryLevels) -> bool:
    return all(
        bool(((e <= k).to(torch.uint8) <= (e <= k + 1).to(torch.uint8)).all())
        for e in entry.tensors.values()
        for k in range(1, entry.n_levels)
    )


@settings(deadline=None, max_examples=60)
@given(shapes, sparsities, st.sampled_from(SCORES), st.integers(0, 99), st.sampled_from([None, 1, 3]))
def test_counts_are_exact_and_levels_nest(
    sizes: list[tuple[int, ...]], values: list[float], score: Score, seed: int, distinct: int | None
) -> None:
    weights = make_weights(sizes, seed, distinct)
    total = sum(int(np.prod(size)) for size in sizes)
    entry = select_entry_levels(weights, make_levels(values), score, macs=make_macs(weights))
    for k, sparsity in enumerate(values, start=1):
        kept = sum(int((e.numpy() <= k).sum()) for e in entry.tensors.values())
        assert kept == round(total * (1 - sparsity))
    assert is_nested(entry)


@settings(deadline=None, max_examples=40)
@given(shapes, sparsities, st.sampled_from(SCORES), st.sampled_from(["4x1", "2x2", "1x3"]), st.integers(0, 9))
def test_all_weights_of_a_block_enter_at_the_same_level(
    sizes: list[tuple[int, ...]], values: list[float], score: Score, text: str, seed: int
) -> None:
    pattern = parse_pattern(text)
    weights = make_weights(sizes, seed, None)
    entry = select_entry_levels(weights, make_levels(values, pattern), score, macs=make_macs(weights))
    assert is_nested(entry)
    for tensor in entry.tensors.values():
        flat = tensor.numpy().reshape(tensor.shape[0], tensor.shape[1], -1)
        for row in range(0, flat.shape[0], pattern.rows):
            for col in range(0, flat.shape[1], pattern.cols):
                block = flat[row : row + pattern.rows, col : col + pattern.cols]
                assert (block == block[:1, :1]).all()


@pytest.mark.parametrize("score", ["lamp", "magnitude"])
def test_blocks_reach_the_target_to_half_a_block(score: Score) -> None:
    weights = make_weights([(64, 48), (32, 16, 3, 3)], 0, None)
    total = 64 * 48 + 32 * 16 * 9
    entry = select_entry_levels(weights, make_levels([0.9, 0.5], parse_pattern("32x1")), score)
    for k, sparsity in enumerate([0.9, 0.5], start=1):
        assert abs(entry.count_kept(k) - total * (1 - sparsity)) <= 16  # half a block of 32 weights


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from([2, 4, 8]), st.booleans(), st.integers(0, 99))
def test_n_of_m_keeps_the_largest_n_of_each_group(
    out: int, groups: int, m: int, kernel: bool, seed: int
) -> None:
    shape = (out, groups * m, 3, 3) if kernel else (out, groups * m)
    weights = make_weights([shape], seed, None)
    levels = [
        Level("core", 1 - 1 / m, Pattern("n:m", n=1, m=m)),
        Level("half", 0.5, Pattern("n:m", n=m // 2, m=m)),
        Level("full", 0.0),
    ]
    entry = select_entry_levels(weights, levels)["layer0.weight"].numpy()
    weight = np.abs(weights["layer0.weight"].numpy()).reshape(out, groups, m, -1)
    for k, n in ((1, 1), (2, m // 2), (3, m)):
        kept = (entry <= k).reshape(out, groups, m, -1)
        assert (kept.sum(2) == n).all()
        smallest_kept = np.where(kept, weight, np.inf).min(2)
        assert (smallest_kept >= np.where(kept, -np.inf, weight).max(2)).all()


def test_n_of_m_leaves_other_layers_dense() -> None:
    weights = make_weights([(8, 3, 3, 3), (16, 1, 3, 3), (8, 8)], 0, None)
    entry = select_entry_levels(weights, [Level("a", 0.5, Pattern("n:m", n=2, m=4)), Level("b", 0.0)])
    assert entry.count_kept(1, "layer0.weight") == 8 * 27
    assert entry.count_kept(1, "layer1.weight") == 16 * 9
    assert entry.count_kept(1, "layer2.weight") == 32


def test_lamp_follows_its_equation() -> None:
    """NumPy evaluates equation 4 of Lee et al. in float64; the kept weights are the same."""
    weights = make_weights([(9, 7), (4, 5, 3, 3), (3, 40)], 3, None)
    scores = []
    for weight in weights.values():
        squared = weight.numpy().astype(np.float64).reshape(-1) ** 2
        scores.append(np.array([value / squared[squared >= value].sum() for value in squared]))
    joined = np.concatenate(scores)
    for sparsity in (0.9, 0.6, 0.2):
        entry = select_entry_levels(weights, make_levels([sparsity, 0.0]), "lamp")
        ours = np.concatenate([e.numpy().reshape(-1) <= 1 for e in entry.tensors.values()])
        best = np.argsort(-joined)[: round(len(joined) * (1 - sparsity))]
        assert set(np.flatnonzero(ours)) == set(best)


def test_magnitude_keeps_the_largest_of_all_layers() -> None:
    weights = make_weights([(9, 7), (3, 40)], 5, None)
    joined = np.concatenate([w.numpy().reshape(-1) for w in weights.values()])
    entry = select_entry_levels(weights, make_levels([0.75, 0.0]), "magnitude")
    ours = np.concatenate([e.numpy().reshape(-1) <= 1 for e in entry.tensors.values()])
    assert set(np.flatnonzero(ours)) == set(np.argsort(-np.abs(joined))[: round(len(joined) * 0.25)])


def test_uniform_gives_every_layer_the_same_density() -> None:
    budgets = layer_budgets({"a": (10, 10), "b": (20, 5, 2, 2)}, make_levels([0.9, 0.0]), "uniform")
    assert budgets == [{"a": 10, "b": 40}, {"a": 100, "b": 400}]


def test_erk_densities_follow_their_formula() -> None:
    """Densities are proportional to sum(shape) / prod(shape); the small layer is full at a density of 1."""
    shapes_ = {"big": (100, 100, 3, 3), "wide": (200, 100), "small": (10, 3, 3, 3)}
    target = round(0.1 * (90_000 + 20_000 + 270))
    (budget, _) = layer_budgets(shapes_, make_levels([0.9, 0.0]), "erk")
    assert budget["small"] == 270  # 19 * scale is above its 270 weights at this target
    scale = (target - 270) / (206 + 300)
    assert budget["big"] == pytest.approx(206 * scale, abs=1)
    assert budget["wide"] == pytest.approx(300 * scale, abs=1)
    assert sum(budget.values()) == target


def test_per_mac_of_equal_layers_prefers_the_one_with_fewer_macs() -> None:
    """Both layers hold 1, 2, 3, 4, so LAMP scores are 1/30, 4/29, 9/25 and 1; one multiplies ten times."""
    weights = {name: torch.tensor([[1.0, 2.0], [3.0, 4.0]]) for name in ("early", "late")}
    levels = make_levels([0.5, 0.25])
    entry = select_entry_levels(weights, levels, "per_mac", macs={"early": 40, "late": 4})
    # early: 0.0033, 0.0138, 0.036, 0.1; late: 0.033, 0.138, 0.36, 1
    assert entry["late"].tolist() == [[2, 1], [1, 1]]
    assert entry["early"].tolist() == [[3, 3], [2, 1]]
    same = select_entry_levels(weights, levels, "per_mac", macs={"early": 4, "late": 4})
    lamp = select_entry_levels(weights, levels, "lamp")
    assert all(torch.equal(same[name], lamp[name]) for name in weights)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.integers(1, 9), st.sampled_from([(9, 1), (1, 4), (2, 3)]))
def test_no_other_choice_within_the_macs_of_per_mac_is_more_important(
    seed: int, kept: int, positions: tuple[int, int]
) -> None:
    weights = make_weights([(2, 2), (3, 2)], seed, None)
    macs = {name: w.numel() * p for (name, w), p in zip(weights.items(), positions, strict=True)}
    entry = select_entry_levels(weights, make_levels([1 - kept / 10, 0.0]), "per_mac", macs=macs)
    energies = [np.square(weight.numpy().astype(np.float64)).ravel() for weight in weights.values()]
    lamp = np.concatenate([e / np.array([e[e >= x].sum() for x in e]) for e in energies])
    cost = np.repeat(positions, [e.size for e in energies])
    chosen = np.concatenate([entry[name].numpy().ravel() <= 1 for name in weights])
    for choice in range(1 << chosen.size):
        other = np.array([choice >> bit & 1 for bit in range(chosen.size)], bool)
        if cost[other].sum() <= cost[chosen].sum():
            assert lamp[other].sum() <= lamp[chosen].sum() * (1 + 1e-5)


def test_per_mac_counts_a_weight_without_macs_as_one_that_multiplies_once() -> None:
    weights = make_weights([(4, 4), (4, 4)], 3, None)
    unknown = select_entry_levels(
        weights, make_levels([0.5, 0.0]), "per_mac", macs={"layer0.weight": 0, "layer1.weight": 64}
    )
    once = select_entry_levels(
        weights, make_levels([0.5, 0.0]), "per_mac", macs={"layer0.weight": 16, "layer1.weight": 64}
    )
    assert all(torch.equal(unknown[name], once[name]) for name in weights)
    assert unknown.count_kept(1, "layer0.weight") > unknown.count_kept(1, "layer1.weight") > 0


boxes = st.lists(st.floats(0.1, 1), min_size=2, max_size=4, unique=True).map(
    lambda shares: [*sorted(shares)[:-1], 1.0]
)


def make_boxes(weights: dict[str, torch.Tensor], shares: list[float]) -> dict[str, torch.Tensor]:
    """Return the lowest level that has each weight; level k has `shares[k - 1]` of two dimensions."""
    available = {}
    for name, weight in weights.items():
        entry = torch.full(weight.shape, len(shares), dtype=torch.uint8)
        for level in range(len(shares), 0, -1):
            rows, cols = (max(1, int(shares[level - 1] * extent)) for extent in weight.shape[:2])
            entry[:rows, :cols] = level
        available[name] = entry
    return available


@settings(deadline=None, max_examples=60)
@given(shapes, boxes, st.data(), st.sampled_from(SCORES), st.sampled_from([None, 1, 3]))
def test_smaller_levels_keep_their_share_of_what_they_have(
    sizes: list[tuple[int, ...]], shares: list[float], data: st.DataObject, score: Score, distinct: int | None
) -> None:
    count = len(shares)
    values = sorted(data.draw(st.lists(st.floats(0, 0.99), min_size=count, max_size=count)), reverse=True)
    weights = make_weights(sizes, 0, distinct)
    available = make_boxes(weights, shares)
    entry = select_entry_levels(weights, make_levels(values), score, available, make_macs(weights))
    for name, tensor in entry.tensors.items():
        assert (tensor >= available[name]).all()
    for k, sparsity in enumerate(values, start=1):
        usable = sum(int((box.numpy() <= k).sum()) for box in available.values())
        assert sum(int((e.numpy() <= k).sum()) for e in entry.tensors.values()) == round(
            usable * (1 - sparsity)
        )


@settings(deadline=None, max_examples=30)
@given(shapes, boxes, st.data(), st.sampled_from(SCORES))
def test_available_everywhere_is_the_same_as_none(
    sizes: list[tuple[int, ...]], shares: list[float], data: st.DataObject, score: Score
) -> None:
    count = len(shares)
    values = sorted(data.draw(st.lists(st.floats(0, 0.99), min_size=count, max_size=count)), reverse=True)
    weights = make_weights(sizes, 1, None)
    everywhere = {name: torch.ones_like(weight, dtype=torch.uint8) for name, weight in weights.items()}
    macs = make_macs(weights)
    plain = select_entry_levels(weights, make_levels(values), score, macs=macs)
    boxed = select_entry_levels(weights, make_levels(values), score, everywhere, macs)
    for name in plain:
        assert torch.equal(plain[name], boxed[name])


@pytest.mark.parametrize("score", ["lamp", "uniform"])
def test_a_level_without_a_layer_spends_its_blocks_on_the_others(score: Score) -> None:
    weights = make_weights([(64, 48), (64, 48)], 0, None)
    available = {"layer0.weight": torch.full((64, 48), 1), "layer1.weight": torch.full((64, 48), 2)}
    available = {name: tensor.to(torch.uint8) for name, tensor in available.items()}
    levels = make_levels([0.75, 0.5], parse_pattern("32x1"))
    entry = select_entry_levels(weights, levels, score, available)
    assert entry.count_kept(1, "layer1.weight") == 0
    assert entry.count_kept(1, "layer0.weight") == 64 * 48 // 4
    assert entry.count_kept(2) == 64 * 48


def test_n_of_m_leaves_a_layer_dense_if_a_narrower_level_cuts_through_a_group() -> None:
    weights = make_weights([(8, 8), (8, 8)], 0, None)
    available = {name: torch.ones(8, 8, dtype=torch.uint8) for name in weights}
    available["layer0.weight"][:, 4:] = 2
    available["layer1.weight"][:, 6:] = 2
    levels = [Level("a", 0.5, parse_pattern("2:4"), width=0.5), Level("b", 0.0)]
    entry = select_entry_levels(weights, levels, "lamp", available)
    groups = (entry["layer0.weight"].numpy()[:, :4] <= 1).sum(1)
    assert (groups == 2).all()
    assert torch.equal(entry["layer1.weight"], available["layer1.weight"])
    assert (entry["layer0.weight"] <= 2).all()
