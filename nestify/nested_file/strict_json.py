"""JSON that nobody vouches for: parsed without the freedoms that parsers disagree on."""

import json
import math
from collections import Counter
from typing import Any

MAX_QUOTED = 120
MAX_INTEGER_DIGITS = 20


def strict_json(text: str) -> Any:
    """Parse JSON and refuse what JSON parsers disagree on.

    Raises:
        ValueError: for invalid JSON, a key given twice, NaN or an infinity, an integer beyond 64 bits,
            text that is not Unicode, or nesting too deep for the parser.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_int=_bounded_int,
            parse_float=_finite_float,
        )
        json.dumps(value, ensure_ascii=False).encode()  # fails on lone surrogates, which no output can print
    except RecursionError:
        raise ValueError("values are nested too deep") from None
    except UnicodeEncodeError:
        raise ValueError("a string is not valid Unicode") from None
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {quoted(twice)} is given twice")
    return table


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _bounded_int(text: str) -> int:
    if len(text) > MAX_INTEGER_DIGITS:
        raise ValueError(f"integer {text[:MAX_INTEGER_DIGITS]}... is beyond 64 bits")
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text[:MAX_INTEGER_DIGITS]} is beyond float64")
    return value


def quoted(text: str) -> str:
    """A name from an untrusted file, escaped and cut to a length that fits a message."""
    shown = repr(text)
    return shown if len(shown) <= MAX_QUOTED else f"{shown[: MAX_QUOTED - 4]}...{shown[-1]}"
