"""Names of what is left of a network, and what they are in a shorter one."""

from hypothesis import given, settings
from hypothesis import strategies as st

from nestify.exports.rebuild.names import COUNT, Shapes, Wanted

BLOCKS = 7


def network(places: list[int]) -> Shapes:
    """A stem and blocks of two layers each, whose width tells the block."""
    shapes: dict[str, tuple[int, ...]] = {
        "stem.0.weight": (2, 3),
        "stem.2.weight": (4, 2),
        "stem.2.count": (),
    }
    for place in places:
        shapes |= {f"blocks.{place}.mlp.{layer}.weight": (place, 8) for layer in (0, 3)}
    return shapes


@settings(deadline=None)
@given(st.sets(st.integers(0, BLOCKS - 1), min_size=1))
def test_what_is_left_is_counted_through(kept: set[int]) -> None:
    left = sorted(kept)
    wanted = Wanted(network(list(range(BLOCKS))), network(left))
    names = wanted.names(network(list(range(len(left)))))
    assert names == {
        **{name: name for name in ("stem.0.weight", "stem.2.weight", "stem.2.count")},
        **{
            f"blocks.{place}.mlp.{layer}.weight": f"blocks.{old}.mlp.{layer}.weight"
            for place, old in enumerate(left)
            for layer in (0, 3)
        },
    }


@settings(deadline=None)
@given(st.sets(st.integers(0, BLOCKS - 1), min_size=1), st.integers(1, 2 * BLOCKS))
def test_a_network_has_the_sizes_of_a_level_if_it_is_as_long(kept: set[int], length: int) -> None:
    wanted = Wanted(network(list(range(BLOCKS))), network(sorted(kept)))
    found = network(list(range(length)))
    names = {name.split(".")[1] for name in wanted.names(found).values() if name.startswith("blocks")}
    places = kept if length == len(kept) else kept & set(range(length))  # otherwise under its own name
    assert names == {str(place) for place in places}
    assert wanted.sizes_of(found)["blocks", COUNT] == length
    assert wanted.sizes.get(("blocks", COUNT), BLOCKS) == len(kept)


def test_what_no_logit_depends_on_may_be_missing() -> None:
    full = {"conv.weight": (8, 3), "conv.calls": (), "mask_token": (8,)}
    level = {"conv.weight": (4, 3)}
    wanted = Wanted(full, level)
    assert wanted.sizes == {("conv.weight", 0): 4, ("conv.weight", 1): 3}
    assert wanted.names(full) == {"conv.weight": "conv.weight"}
