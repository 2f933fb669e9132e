"""Untrusted JSON, parsed without the extensions that parsers disagree on."""

import json
import math
import re
from collections import Counter
from typing import Any

MAX_QUOTED = 120
MAX_INTEGER_DIGITS = 20

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def strict_json(text: str, max_keys: int | None = None) -> Any:
    """Parse JSON and refuse what JSON parsers disagree on.

    Args:
        text: the document, decoded from UTF-8, so that it can contain surrogates only as escapes.
        max_keys: largest number of keys of one object; None for any number.

    Raises:
        ValueError: for invalid JSON, a key given twice, NaN or an infinity, an integer beyond 64 bits,
            text that is not Unicode, nesting too deep for the parser, or an object with too many keys.
    """

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if max_keys is not None and len(pairs) > max_keys:
            raise ValueError(f"an object has {len(pairs)} keys, more than {max_keys}")
        return _unique_keys(pairs)

    try:
        value = json.loads(
            text,
            object_pairs_hook=table,
            parse_constant=_refuse_constant,
            parse_int=_bounded_int,
            parse_float=_finite_float,
        )
        if _SURROGATE.search(text):  # fails on lone surrogates, which no output can print
            json.dumps(value, ensure_ascii=False).encode()
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
    """Escape a name from an untrusted file, and cut it to a length that fits into a message."""
    shown = repr(text)
    return shown if len(shown) <= MAX_QUOTED else f"{shown[: MAX_QUOTED - 4]}...{shown[-1]}"


GET_ANOTHER = "get an intact copy or write it again"
NOT_NESTED = "give a nested file that nestify wrote"


class Refusal(ValueError):
    """A violation of the format; the reader turns it into a BadFileError, the writer into an OutputError.

    Args:
        problem: what is wrong, to follow the file's name and a colon.
        remedy: what the user can do.
    """

    def __init__(self, problem: str, remedy: str = GET_ANOTHER) -> None:
        super().__init__(f"{problem}; {remedy}")
        self.problem = problem
