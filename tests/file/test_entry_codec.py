"""Coding of entry positions, compared with NumPy and closed forms."""

from functools import reduce
from math import ceil, floor, log2, prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nestify.file.entry_codec import (
    choose_coding,
    choose_codings,
    coded_bytes,
    decode,
    encode,
    expand_units,
    reduce_to_units,
    remaining_units,
    unit_grid,
)
from nestify.file.manifest import Coding


def decode_elias_fano(data: bytes, remaining: int, count: int) -> list[int]:
    """Decode Elias-Fano bit by bit from the definition, as an independent implementation of the format."""
    bits = [(byte >> i) & 1 for byte in data for i in range(8)]
    low = max(0, floor(log2(remaining / count)))
    low_part_bits = 64 * ceil(count * low / 64)
    ones = [i for i, bit in enumerate(bits[low_part_bits:]) if bit]
    lows = [sum(bits[i * low + b] << b for b in range(low)) for i in range(count)]
    return [(one - i) << low | lows[i] for i, one in enumerate(ones)]


def decode_mask(coding: Coding, data: np.ndarray, remaining: int, count: int) -> np.ndarray:
    """Decode whether each unit enters, (remaining,), in two parts."""
    entering = decode(coding, data, remaining, count)
    enters, middle = np.zeros(remaining, np.bool_), remaining // 3
    enters[entering.between(0, middle)] = True
    enters[entering.between(middle, remaining) + middle] = True
    return enters


@st.composite
def entering(draw: st.DrawFn) -> np.ndarray:
    remaining = draw(st.integers(1, 700))
    density = draw(st.sampled_from([0.0, 0.002, 0.01, 0.05, 0.2, 0.3, 0.5, 0.95, 1.0]))
    seed = draw(st.integers(0, 2**32 - 1))
    return np.random.default_rng(seed).random(remaining) < density


@given(entering())
def test_decode_inverts_encode(enters: np.ndarray) -> None:
    remaining, count = enters.size, int(enters.sum())
    coding = choose_coding(remaining, count)
    data = encode(coding, enters)
    assert data.dtype == np.uint8
    assert data.size == coded_bytes(coding, remaining, count)
    np.testing.assert_array_equal(decode_mask(coding, data, remaining, count), enters)


@given(entering())
def test_stored_bits_follow_the_format(enters: np.ndarray) -> None:
    remaining, count = enters.size, int(enters.sum())
    coding = choose_coding(remaining, count)
    data = encode(coding, enters).tobytes()
    if coding == "bits":
        assert int.from_bytes(data, "little") == sum(1 << int(i) for i in np.flatnonzero(enters))
    elif coding == "elias-fano":
        assert decode_elias_fano(data, remaining, count) == np.flatnonzero(enters).tolist()
    else:
        assert data == b""


@given(st.integers(1, 10**9), st.data())
def test_lengths_are_the_closed_forms(remaining: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, remaining))
    low = max(0, floor(log2(remaining / count)))
    high_bits = count + ((remaining - 1) >> low) + 1
    bits = 8 * ceil(remaining / 64)
    elias_fano = 8 * ceil(count * low / 64) + 8 * ceil(high_bits / 64)
    assert coded_bytes("bits", remaining, count) == bits
    assert coded_bytes("elias-fano", remaining, count) == elias_fano
    if count < remaining:
        assert choose_coding(remaining, count) == ("elias-fano" if elias_fano < bits else "bits")
    else:
        assert choose_coding(remaining, count) == "all"


@pytest.mark.parametrize("density", [0.001, 0.01, 0.05, 0.2, 0.5])
def test_coding_is_close_to_the_entropy(density: float) -> None:
    remaining = 10**6
    count = int(density * remaining)
    entropy = -density * log2(density) - (1 - density) * log2(1 - density)
    assert 8 * coded_bytes(choose_coding(remaining, count), remaining, count) <= 1.4 * entropy * remaining


def test_codings_of_levels() -> None:
    assert choose_codings(1000, [50, 0, 900, 50]) == ["elias-fano", "none", "bits", "all"]
    assert choose_codings(0, [0, 0]) == ["none", "none"]
    assert choose_codings([1000, 2000, 2000, 3000], [1000, 20, 980, 999]) == [
        "all",
        "elias-fano",
        "all",
        "bits",
    ]


def test_units_that_remain() -> None:
    assert remaining_units(10, [3, 0, 4]) == [10, 7, 7]
    assert remaining_units([4, 6, 10], [3, 0, 4]) == [4, 3, 7]
    assert remaining_units([4, 6, 10], [5, 0, 4]) == [4, 1, 5]
    assert remaining_units(10, []) == []


def flip(data: np.ndarray, bit: int) -> np.ndarray:
    flipped = data.copy()
    flipped[bit // 8] ^= 1 << (bit % 8)
    return flipped


BITS = np.arange(100) % 2 == 0  # 50 of 100: two words of bits, the last 28 padding
SPARSE = np.isin(np.arange(1000), [3, 500, 501, 900])  # low = 7: 28 low bits, then 4 + 7 + 1 high bits


@pytest.mark.parametrize(
    ("enters", "damage", "problem"),
    [
        (BITS, lambda data: data[:-1], "15 bytes where 16"),
        (BITS, lambda data: np.append(data, np.uint8(0)), "17 bytes where 16"),
        (BITS, lambda data: flip(data, 0), "49 units where 50"),
        (BITS, lambda data: flip(data, 127), "padding"),
        (SPARSE, lambda data: data[:-8], "8 bytes where 16"),
        (SPARSE, lambda data: flip(data, 28), "padding"),
        (SPARSE, lambda data: flip(data, 64 + 12), "padding"),
        (SPARSE, lambda data: flip(data, 64), "3 units where 4"),
        (SPARSE, lambda data: flip(data, 14), "do not increase"),  # 501 -> 500
        (SPARSE, lambda data: reduce(flip, (23, 24, 26, 27), data), "position 1000 is not below 1000"),
        (SPARSE, lambda data: flip(flip(data, 64 + 10), 64 + 11), "not below 1000"),
    ],
)
def test_damage_is_refused(enters: np.ndarray, damage, problem: str) -> None:
    remaining, count = enters.size, int(enters.sum())
    coding = choose_coding(remaining, count)
    assert coding == ("bits" if enters is BITS else "elias-fano")
    with pytest.raises(ValueError, match=problem):
        decode(coding, damage(encode(coding, enters)), remaining, count)


@pytest.mark.parametrize("coding", ["all", "none", "elias-fano"])
def test_a_coding_that_was_not_chosen_is_refused(coding) -> None:
    with pytest.raises(ValueError, match="50 of 100"):
        decode(coding, np.empty(0, np.uint8), 100, 50)


@given(st.integers(2, 400), st.integers(0, 2**32 - 1), st.data())
def test_any_accepted_bytes_are_canonical(remaining: int, seed: int, data: st.DataObject) -> None:
    """If the decoder accepts some bytes, the encoder produces the same bytes from the decoded units."""
    count = data.draw(st.integers(1, remaining - 1))
    enters = np.zeros(remaining, np.bool_)
    enters[np.random.default_rng(seed).permutation(remaining)[:count]] = True
    coding = choose_coding(remaining, count)
    coded = encode(coding, enters)
    for _ in range(data.draw(st.integers(1, 3))):
        coded = flip(coded, data.draw(st.integers(0, 8 * coded.size - 1)))
    try:
        enters = decode_mask(coding, coded, remaining, count)
    except ValueError:
        return
    assert enters.sum() == count
    np.testing.assert_array_equal(encode(coding, enters), coded)


shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7)
units = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(shapes, units, st.integers(0, 2**32 - 1))
def test_units_against_a_loop(shape: tuple[int, ...], unit: tuple[int, int], seed: int) -> None:
    if len(shape) < 2:
        unit = (1, 1)
    grid = unit_grid(shape, unit)
    values = np.random.default_rng(seed).integers(1, 5, prod(grid)).astype(np.uint8)
    expected = np.empty(shape, np.uint8)
    for index in np.ndindex(*shape):
        block = (index[0] // unit[0], index[1] // unit[1], *index[2:]) if len(shape) >= 2 else index
        expected[index] = values.reshape(grid)[block]
    np.testing.assert_array_equal(expand_units(values, shape, unit), expected)
    np.testing.assert_array_equal(reduce_to_units(expected, unit), values)


def test_entry_levels_that_differ_inside_a_block_are_refused() -> None:
    entry = np.ones((5, 4), np.uint8)
    entry[3, 1] = 2
    with pytest.raises(ValueError, match="block of 2x2"):
        reduce_to_units(entry, (2, 2))
