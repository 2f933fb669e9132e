"""The search finds the arguments of networks whose sizes are known in closed form."""

from hypothesis import given, settings
from hypothesis import strategies as st

from nestify.exports.rebuild.arguments import Arguments
from nestify.exports.rebuild.names import Shapes, Wanted
from nestify.exports.rebuild.search import Search

FULL: Arguments = {
    "num_classes": 10,
    "dims": [32, 64],
    "depths": [1, 2],
    "mlp_ratio": 4.0,
    "heads": [2, 4],
    "groups": [2, 4],
    "stem": None,
    "name": "full",
    "gates": [[6], [8]],
}


def build(arguments: Arguments) -> Shapes | None:
    """A network of two stages, each of one block and `depth` more.

    Heads and groups show in no shape, but divide the width.
    """
    shapes: dict[str, tuple[int, ...]] = {"head.weight": (arguments["num_classes"], arguments["dims"][-1])}
    before = 3
    for stage, (dim, depth) in enumerate(zip(arguments["dims"], arguments["depths"], strict=True)):
        if dim % arguments["heads"][stage] or dim % arguments["groups"][stage]:
            return None
        hidden = int(dim * arguments["mlp_ratio"])
        shapes[f"stages.{stage}.down.weight"] = (dim, before)
        for block in range(depth + 1):
            prefix = f"stages.{stage}.blocks.{block}"
            shapes |= {f"{prefix}.norm.weight": (dim,), f"{prefix}.mlp.0.weight": (hidden, dim)}
            shapes |= {f"{prefix}.gate.weight": (arguments["gates"][stage][0] + 2, dim)}
        before = dim
    return shapes


def left_of(shapes: Shapes, kept: dict[int, list[int]]) -> Shapes:
    """A network's tensors under the numbers that its blocks have in the full one."""
    found = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        if len(parts) > 3 and parts[2] == "blocks":
            parts[3] = str(kept[int(parts[1])][int(parts[3])])
        found[".".join(parts)] = shape
    return found


@settings(deadline=None)
@given(
    dims=st.tuples(st.integers(1, 16).map(lambda n: 2 * n), st.integers(1, 16).map(lambda n: 4 * n)),
    hidden=st.integers(1, 4),
    gates=st.tuples(st.integers(1, 6), st.integers(1, 8)),
    kept=st.tuples(st.sets(st.integers(0, 1), min_size=1), st.sets(st.integers(0, 2), min_size=1)),
)
def test_it_finds_what_made_a_level(
    dims: tuple[int, int], hidden: int, gates: tuple[int, int], kept: tuple[set[int], set[int]]
) -> None:
    made = FULL | {
        "dims": list(dims),
        "depths": [len(blocks) - 1 for blocks in kept],
        "mlp_ratio": float(hidden),
        "gates": [[gates[0]], [gates[1]]],
    }
    shapes, full = build(made), build(FULL)
    assert shapes is not None
    assert full is not None
    level = left_of(shapes, {stage: sorted(blocks) for stage, blocks in enumerate(kept)})
    search = Search(FULL, Wanted(full, level), build)
    assert search.run() is None
    assert build(search.arguments) == shapes
    assert search.arguments == made | {key: search.arguments[key] for key in ("heads", "groups")}


def test_heads_are_tried_in_proportion_to_the_width() -> None:
    for dims, heads in (([16, 64], [1, 4]), ([16, 16], [1, 1]), ([32, 48], [2, 3])):
        search = search_for(FULL | {"dims": dims, "heads": heads})
        assert search.run() is None
        found = [(variant["heads"], variant["groups"]) for variant in search.variants()]
        assert found == [([2, 4], [2, 4]), (heads, [2, 4]), ([2, 4], heads), (heads, heads)]


def test_heads_that_do_not_divide_the_width_follow_it_at_once() -> None:
    full = FULL | {"dims": [32, 48], "heads": [2, 12], "groups": [2, 12]}
    search = search_for(full | {"dims": [32, 20], "heads": [2, 5], "groups": [2, 5]}, full)
    assert search.run() is None
    assert (search.arguments["heads"], search.arguments["groups"]) == ([2, 5], [2, 5])


def test_heads_that_cannot_follow() -> None:
    search = search_for(FULL | {"dims": [32, 50], "heads": [1, 2], "groups": [1, 2]})
    assert search.run() == "no arguments give 'head.weight' shape 10x50"


def test_a_ratio_is_rounded_so_that_sizes_are_not_too_small() -> None:
    for ratio, hidden in ((25 / 6, 100), (7 / 3, 56), (1 / 24, 1)):
        dims = [24, 48]
        made = FULL | {"dims": dims, "mlp_ratio": ratio + 1e-12}  # 24 * (25 / 6) may be 99.99...
        search = search_for(made)
        assert search.run() is None
        assert [int(dim * search.arguments["mlp_ratio"]) for dim in dims] == [hidden, 2 * hidden]


def search_for(made: Arguments, full: Arguments = FULL) -> Search:
    before, level = build(full), build(made)
    assert before is not None
    assert level is not None
    return Search(full, Wanted(before, level), build)
