"""Seeded damage to nested files: bytes, JSON text, JSON values, tensors, sizes, splices, and forgeries.

`mutate` corrupts an intact file in one of many ways. A kind whose name begins with `forged` changes the data
and recomputes the hashes, like an attacker who knows the format. For all other kinds, a reader must notice
any change to the data.
"""

import json
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.file.damage import Parts, raw_content

Rng = random.Random
Node = dict[str, Any] | list[Any]

NUMBERS = [-(2**63), -1, -0.0, 0, 1, 2, 3, 7, 8, 16, 255, 256, 9999, 10_000, 2**15, 2**31, 2**32, 2**53 + 1]
NUMBERS += [2**62, 2**63 - 1, 2**63, 2**64, 10**19, 10**20, 10**40, 0.5, 1e-320, 1e15, 1e308]
TEXTS = ["", " ", "x", "F16", "F64", "BOOL", "all", "none", "bits", "elias-fano", "weight", "1", "../x"]
TEXTS += ["hf-hub:a/b", "\0", "\n", "a\r\nb", "\x1b[31m", "\u202e", "\u2028", "\ud800", "\U0001f600"]
TEXTS += ["fc.weight", "level1/values/fc.weight", "level1/pad/0", "{0}%s\\", "x" * 5000, "\U0001f600" * 300]
OTHERS: list[Any] = [None, True, False, [], {}, [0], [1, 2], [[]], [None], {"a": 1}, {"": {}}]

SNIPPETS = ["NaN", "-Infinity", "1e999", "-0", "01", "+1", "1.", ".5", "0x10", "1_0", "tru", "//", "'a'"]
SNIPPETS += ['"\\ud800"', '"\\u0000"', '"\\x"', "\ufeff", "\0", "\u0661", ",,", '"', '"a":1,', '"shape":[0],']
SNIPPETS += ["9" * 25, "9" * 5000, "1" + "0" * 400 + ".0", '"' + "x" * 20_000 + '"', "[0]" * 100, "[0,[],{}]"]
SNIPPETS += ["[" * 200 + "]" * 200, "[" * 30_000, '{"a":' * 30_000, "[" * 900 + "]" * 900, "null", "{}", "\\"]
ODD_VALUES = ["0000c07f", "0000807f", "000080ff", "01000000", "00000080", "ffffffff", "007c", "807f"]
"""NaN, infinities, subnormal numbers and minus zero, in little-endian hexadecimal."""
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|true|false|null|[\[\]{}:,]')


def mutate(content: bytes, donor: bytes, rng: Rng) -> tuple[str, bytes]:
    """Corrupt a file.

    Args:
        content: bytes of an intact nested file.
        donor: bytes of another intact nested file, for splices.
        rng: source of all random choices; the same state gives the same file.

    Returns:
        The kind of damage, one of `KINDS`, and the corrupted file, which sometimes equals the intact file.
    """
    kind = rng.choice(KINDS)
    if kind in BYTES:
        return kind, BYTES[kind](content, donor, rng)
    parts = Parts.parse(content)
    if kind == "combination":
        for change in rng.choices([VALUES[kind] for kind in VALUES], k=rng.randint(2, 4)):
            _try(change, parts, rng)
    else:
        _try(VALUES[kind], parts, rng)
    return kind, parts.content


def _try(change: Callable[[Parts, Rng], object], parts: Parts, rng: Rng) -> None:
    """Apply a change, unless an earlier change of a combination has removed what it would change."""
    try:
        change(parts, rng)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError):
        return


# Bytes


def _header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def _flip(content: bytes, begin: int, end: int, rng: Rng) -> bytes:
    flipped = bytearray(content)
    for place in rng.sample(range(begin, end), min(end - begin, rng.choice([1, 1, 1, 2, 8, 64]))):
        flipped[place] ^= rng.choice([1 << rng.randrange(8), rng.randrange(1, 256)])
    return bytes(flipped)


def _header_length(content: bytes, _donor: bytes, rng: Rng) -> bytes:
    length, size = int.from_bytes(content[:8], "little"), len(content)
    near = [length + step for step in (-16, -8, -1, 1, 8, 16)] + [size - 8, size - 7, size, length // 2]
    hostile = [0, 1, 2, 2**26, 2**26 + 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, rng.getrandbits(64)]
    return rng.choice(near + hostile).to_bytes(8, "little") + content[8:]


def _move(content: bytes, _donor: bytes, rng: Rng) -> bytes:
    """Remove, overwrite, zero, reverse or duplicate some bytes anywhere in the file."""
    begin = rng.randrange(len(content))
    end = min(len(content), begin + rng.choice([1, 4, 8, 64, 512]))
    piece = content[begin:end]
    put = rng.choice([b"", bytes(len(piece)), piece + piece, piece[::-1], rng.randbytes(len(piece))])
    return content[:begin] + put + content[end:]


def _extend(content: bytes, donor: bytes, rng: Rng) -> bytes:
    return content + rng.choice([b"\0", bytes(8), rng.randbytes(rng.randint(1, 4096)), content, donor])


def _splice_data(content: bytes, donor: bytes, _rng: Rng) -> bytes:
    return content[: _header_end(content)] + donor[_header_end(donor) :]


def _splice_anywhere(content: bytes, donor: bytes, rng: Rng) -> bytes:
    cut = rng.randrange(min(len(content), len(donor)))
    return content[:cut] + donor[cut:]


def _splice_manifest(content: bytes, donor: bytes, rng: Rng) -> bytes:
    """Use the donor's manifest, or the donor's header entries for about half of the tensors."""
    own, other = Parts.parse(content), Parts.parse(donor)
    if rng.random() < 0.5:
        own.manifest = other.manifest
    else:
        own.header |= {name: other.header[name] for name in other.header if rng.random() < 0.5}
    return own.content


def _splice_level(content: bytes, donor: bytes, rng: Rng) -> bytes:
    own, other = Parts.parse(content), Parts.parse(donor)
    key = rng.choice(["levels", "parameters"])
    own.manifest[key][rng.randrange(len(own.manifest[key]))] = rng.choice(other.manifest[key])
    return own.content


def _json_text(content: bytes, _donor: bytes, rng: Rng) -> bytes:
    """Replace, delete or duplicate a token of the header's or manifest's text, or insert text after it."""
    end = _header_end(content)
    if rng.random() < 0.5:
        return raw_content(_corrupt_text(content[8:end].decode(), rng), content[end:])
    parts = Parts.parse(content)
    metadata = parts.metadata | {"nestify.manifest": _corrupt_text(json.dumps(parts.manifest), rng)}
    return raw_content(json.dumps({"__metadata__": metadata} | parts.header), content[end:])


def _corrupt_text(text: str, rng: Rng) -> str:
    for _ in range(rng.choice([1, 1, 2])):
        tokens = list(TOKEN.finditer(text))
        begin, end = rng.choice(tokens).span() if tokens else (0, 0)
        token = text[begin:end]
        other = rng.choice(tokens)[0] if tokens else ""
        put = rng.choice([rng.choice(SNIPPETS), "", token + token, other, token + rng.choice(SNIPPETS)])
        text = text[:begin] + put + text[end:]
    return text


def _rename_everywhere(content: bytes, _donor: bytes, rng: Rng) -> bytes:
    """Rename a parameter or private tensor consistently in header and manifest."""
    parts, end = Parts.parse(content), _header_end(content)
    name = rng.choice(list(parts.header)).split("/", maxsplit=2)[-1]
    new = json.dumps(rng.choice([text for text in TEXTS if text.isprintable()]))[1:-1]
    new = new.replace("\\", "")
    return raw_content(content[8:end].decode().replace(name, new), content[end:])


# Values within valid JSON


def _places(node: Node) -> list[tuple[Any, Any]]:
    """Return every (container, key) below a node."""
    found: list[tuple[Any, Any]] = []
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        found.append((node, key))
        if isinstance(value, dict | list):
            found += _places(value)
    return found


def _pick(parts: Parts, rng: Rng) -> tuple[Any, Any]:
    """Pick a place in header or manifest; the places that describe the layout of the data are more likely."""
    parameters, levels = parts.manifest.get("parameters"), parts.manifest.get("levels")
    roots = [parts.header, parts.header, parts.metadata, parts.manifest, parameters, parameters, levels]
    return rng.choice(_places(rng.choice([root for root in roots if isinstance(root, dict | list) and root])))


def _hostile_value(old: Any, rng: Rng) -> Any:
    if type(old) in (int, float) and rng.random() < 0.7:
        near = [old + 1, old - 1, -old, old * 2, old + 8, old - 8, float(old), str(old), [old]]
        return rng.choice([rng.choice(near), rng.choice(NUMBERS)])
    return rng.choice([rng.choice(NUMBERS), rng.choice(TEXTS), rng.choice(OTHERS)])


def _change_value(parts: Parts, rng: Rng) -> None:
    node, key = _pick(parts, rng)
    node[key] = _hostile_value(node[key], rng)


def _delete(parts: Parts, rng: Rng) -> None:
    node, key = _pick(parts, rng)
    del node[key]


def _duplicate(parts: Parts, rng: Rng) -> None:
    """Repeat an element of a list once or a hundred times, or add a value to a table under a second key."""
    node, key = _pick(parts, rng)
    if isinstance(node, list):
        node[key:key] = [node[key]] * rng.choice([1, 1, 100])
    else:
        node[f"{key}{rng.choice(TEXTS)}"] = node[key]


def _rename_key(parts: Parts, rng: Rng) -> None:
    tables = [node for node, _ in _places(parts.manifest) if isinstance(node, dict)]
    table = rng.choice([parts.header, parts.metadata, *tables])
    table[rng.choice(TEXTS)] = table.pop(rng.choice(list(table)))


def _swap_values(parts: Parts, rng: Rng) -> None:
    (one, i), (two, j) = _pick(parts, rng), _pick(parts, rng)
    if not isinstance(one[i], dict | list) and not isinstance(two[j], dict | list):
        one[i], two[j] = two[j], one[i]


def _shuffle(parts: Parts, rng: Rng) -> None:
    """Shuffle a list: shapes, counts of entering units, parameters, levels, private tensors."""
    lists = [node[key] for node, key in _places(parts.manifest) if isinstance(node[key], list)]
    rng.shuffle(rng.choice(lists))


def _layout_number(parts: Parts, rng: Rng) -> None:
    """Change a number that describes the layout: shape, offset, bytes of a level, entering units, block."""
    tensors = [(entry, key) for entry in parts.header.values() for key in ("shape", "data_offsets")]
    sizes = [(p, key) for p in parts.manifest["parameters"] for key in ("shape", "unit", "entering")]
    levels = [(level, "data_bytes") for level in parts.manifest["levels"]]
    node, key = rng.choice(rng.choice([tensors, sizes, levels]))
    if isinstance(node[key], list):
        node, key = node[key], rng.randrange(len(node[key]))
    node[key] = rng.choice([_hostile_value(node[key], rng), rng.choice(NUMBERS), rng.getrandbits(20)])


def _swap_tensors(parts: Parts, rng: Rng) -> None:
    """Exchange the offsets, types, shapes or complete header entries of two tensors."""
    one, two = rng.choices(list(parts.header), k=2)
    a, b = parts.header[one], parts.header[two]
    field = rng.choice(["data_offsets", "dtype", "shape", None])
    if field is None:
        parts.header[one], parts.header[two] = b, a
    else:
        a[field], b[field] = b[field], a[field]


def _unstored_tensor(parts: Parts, rng: Rng) -> None:
    """Add a parameter of any shape of which no weight enters, so that it takes no bytes."""
    n = len(parts.manifest["levels"])
    shape = [rng.choice([0, 1, 3, 64, 2**10, 2**12, 2**20, 2**40]) for _ in range(rng.randint(0, 3))]
    entry = {"name": "bomb", "shape": shape, "dtype": rng.choice(["F32", "F16", "I8"]), "maskable": True}
    if len(shape) > 1:
        entry["unit"] = [rng.choice([1, 2, 32, 9999]), rng.choice([1, 1, 4])]
    if rng.random() < 0.3:
        entry["axes"] = [[[rng.choice([2, n + 1]), extent]] for extent in shape]
    parts.manifest["parameters"].append(entry | {"coding": ["none"] * n, "entering": [0] * n})


def _runs(parts: Parts, rng: Rng) -> None:
    """Assign indices to different levels: exchange, change, split, shuffle or add runs."""
    maskable = [parameter for parameter in parts.manifest["parameters"] if parameter["maskable"]]
    parameter = rng.choice([entry for entry in maskable if "axes" in entry] or maskable)
    axes = parameter.setdefault("axes", [[[2, extent]] for extent in parameter["shape"]])
    runs = rng.choice([axis for axis in axes if axis])
    one, two, place = rng.choice(runs), rng.choice(runs), rng.randrange(2)
    match rng.choice(["trade", "level", "count", "cut", "order", "axis", "axes"]):
        case "trade":
            one[place], two[place] = two[place], one[place]
        case "level":
            one[0] = rng.choice([one[0] + 1, one[0] - 1, rng.choice(NUMBERS)])
        case "count":
            one[1], two[1] = one[1] + 1, two[1] - 1
        case "cut":
            one[1] -= (count := rng.randint(0, one[1]))
            runs.insert(runs.index(one), [rng.randint(0, 5), count])
        case "order":
            rng.shuffle(runs)
        case "axis":
            axes[rng.randrange(len(axes))] = rng.choice(
                [[], runs, [[rng.randint(1, 4), sum(parameter["shape"])]]]
            )
        case "axes":
            rng.shuffle(axes)


def _exchange_contents(parts: Parts, rng: Rng) -> None:
    """Exchange the bytes of two tensors of the same size."""
    sizes: dict[int, list[str]] = {}
    for name in parts.header:
        sizes.setdefault(len(parts.tensor(name)), []).append(name)
    one, two = rng.choices(rng.choice([names for names in sizes.values() if len(names) > 1]), k=2)
    a, b = parts.tensor(one), parts.tensor(two)
    a[:], b[:] = bytes(b), bytes(a)


# Forgeries: the data is changed and the hashes are recomputed


def _rehashed(change: Callable[[Parts, Rng], object]) -> Callable[[Parts, Rng], None]:
    def forge(parts: Parts, rng: Rng) -> None:
        change(parts, rng)
        parts.rehash()

    return forge


def _flip_data(parts: Parts, rng: Rng) -> None:
    parts.data[:] = _flip(bytes(parts.data), 0, len(parts.data), rng)


def _flip_positions(parts: Parts, rng: Rng) -> None:
    """Flip bits of coded entry positions: one, or one of each value so that the number of set bits stays."""
    bits = parts.tensor(rng.choice([name for name in parts.header if "/entry/" in name]))
    unpacked = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
    for value in (0, 1) if rng.random() < 0.8 else (0,):
        unpacked[rng.choice(np.flatnonzero(unpacked == value).tolist())] ^= 1
    bits[:] = np.packbits(unpacked, bitorder="little").tobytes()


def _odd_values(parts: Parts, rng: Rng) -> None:
    values = parts.tensor(rng.choice([name for name in parts.header if "/entry/" not in name]))
    raw = bytes.fromhex(rng.choice(ODD_VALUES))
    begin = rng.randrange(0, max(1, len(values) - len(raw) + 1), len(raw))
    values[begin : begin + len(raw)] = raw


def _resize(parts: Parts, rng: Rng) -> None:
    """Change the length of a tensor and move everything after it, so that the container stays consistent."""
    name = rng.choice([name for name in parts.header if len(parts.header[name]["shape"]) == 1])
    entry = parts.header[name]
    [count], (begin, end) = entry["shape"], entry["data_offsets"]
    width = (end - begin) // count if count else 1
    new = max(0, count + rng.choice([-count, -8, -1, 1, 8, 64]))
    grown = (new - count) * width
    parts.data[begin:end] = (parts.data[begin:end] + bytes(max(0, grown)))[: new * width]
    for other in parts.header.values():
        other["data_offsets"] = [place + grown * (place >= end) for place in other["data_offsets"]]
    entry |= {"shape": [new], "data_offsets": [begin, begin + new * width]}
    level = int(re.match(r"level(\d+)", name)[1])  # type: ignore[index]
    parts.manifest["levels"][level - 1]["data_bytes"] += grown


BYTES: dict[str, Callable[[bytes, bytes, Rng], bytes]] = {
    "flip length": lambda content, _, rng: _flip(content, 0, 8, rng),
    "flip header": lambda content, _, rng: _flip(content, 8, _header_end(content), rng),
    "flip data": lambda content, _, rng: _flip(content, _header_end(content), len(content), rng),
    "flip anywhere": lambda content, _, rng: _flip(content, 0, len(content), rng),
    "header length": _header_length,
    "truncate": lambda content, _, rng: content[: rng.randrange(len(content))],
    "extend": _extend,
    "move bytes": _move,
    "splice data": _splice_data,
    "splice anywhere": _splice_anywhere,
    "splice manifest": _splice_manifest,
    "splice level": _splice_level,
    "JSON text": _json_text,
    "rename everywhere": _rename_everywhere,
}
VALUES: dict[str, Callable[[Parts, Rng], object]] = {
    "change value": _change_value,
    "delete value": _delete,
    "duplicate value": _duplicate,
    "rename key": _rename_key,
    "swap values": _swap_values,
    "shuffle list": _shuffle,
    "layout number": _layout_number,
    "swap tensors": _swap_tensors,
    "unstored tensor": _unstored_tensor,
    "runs": _runs,
    "exchange contents": _exchange_contents,
    "forged data": _rehashed(_flip_data),
    "forged positions": _rehashed(_flip_positions),
    "forged values": _rehashed(_odd_values),
    "forged contents": _rehashed(_exchange_contents),
    "forged size": _rehashed(_resize),
}
KINDS = [*BYTES, *VALUES, "combination"]


def is_forgery(kind: str) -> bool:
    """Return whether a kind of damage may change data and recompute the hashes."""
    return kind.startswith("forged") or kind == "combination"
