"""Random damage: nothing but a NestifyError comes out, and no damage to data goes unnoticed."""

import random
from pathlib import Path

import pytest

from nestify.errors import NestifyError
from nestify.nested_file.reader import open_nested_file

from .damage import damage, take_apart


def survives(path: Path) -> bool:
    """Whether a file can be opened and read; any other exception than nestify's own fails the test."""
    try:
        open_nested_file(path).state()
    except NestifyError as error:
        message = str(error)
    else:
        return True
    assert "\n" not in message
    return False


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bytes(small_file: Path, seed: int) -> None:
    rng = random.Random(seed)
    content = small_file.read_bytes()
    data_start = open_nested_file(small_file).header_bytes
    for _ in range(75):
        damaged = bytearray(content)
        places = [rng.randrange(len(content)) for _ in range(rng.choice([1, 1, 2, 8]))]
        for place in places:
            damaged[place] ^= rng.randrange(1, 256)
        small_file.write_bytes(damaged)
        survived = survives(small_file)
        assert not (survived and any(place >= data_start for place in places) and damaged != content)


def test_truncations(small_file: Path) -> None:
    content = small_file.read_bytes()
    for end in random.Random(0).sample(range(len(content)), 100):
        small_file.write_bytes(content[:end])
        assert not survives(small_file)


VALUES = [None, True, -1, 0, 1, 2**31, 2**63, 2**64, 1.5, "", "x", "F16", [], [0], [1, 2], [[]], {}, {"a": 1}]


@pytest.mark.parametrize("seed", range(3))
def test_forged_values(small_file: Path, seed: int) -> None:
    """Valid JSON in which one value, anywhere in header or manifest, is another; hashes made to fit."""
    rng = random.Random(seed)
    content = small_file.read_bytes()
    for _ in range(75):
        small_file.write_bytes(content)

        def forge(parts) -> None:
            node = rng.choice([parts.header, parts.metadata, parts.manifest])
            while True:
                keys = list(node) if isinstance(node, dict) else list(range(len(node)))
                key = rng.choice(keys)
                if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.1:
                    node[key] = rng.choice(VALUES)
                    return
                node = node[key]

        damage(small_file, forge)
        survives(small_file)


@pytest.mark.parametrize("seed", range(3))
def test_forged_data(small_file: Path, seed: int) -> None:
    """Data flipped under hashes that fit."""
    rng = random.Random(seed)
    content = small_file.read_bytes()
    for _ in range(50):
        small_file.write_bytes(content)

        def forge(parts) -> None:
            for _ in range(rng.choice([1, 4, 64])):
                parts.data[rng.randrange(len(parts.data))] ^= rng.randrange(1, 256)
            parts.rehash()

        damage(small_file, forge)
        survives(small_file)


def test_taking_apart_changes_nothing(small_file: Path) -> None:
    """The forging tools themselves: an unforged file still reads."""
    damage(small_file, lambda parts: parts.rehash())
    assert take_apart(small_file).metadata["nestify.format"] == "1"
    assert survives(small_file)
