"""Errors of libraries become errors of nestify; bugs and interrupts stay what they are."""

import pytest
import torch
from torch import nn

from nestify.errors import CheckpointError, DataError, NestifyError, foreign_code


def describe(reason: str) -> NestifyError:
    return DataError(f"photos: {reason}")


class Strange(Exception):
    """An exception type that no list of types would contain."""


@pytest.mark.parametrize("error", [Strange("one two"), RecursionError("one two"), MemoryError("one two")])
def test_any_type_becomes_the_described_error(error: Exception) -> None:
    with pytest.raises(DataError, match=r"^photos: one two$") as caught, foreign_code(describe):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), CheckpointError("mine"), SystemExit(2)])
def test_interrupts_and_our_own_errors_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, foreign_code(describe):
        raise error
    assert caught.value is error


def test_failed_assertions_pass_only_if_they_are_ours() -> None:
    with pytest.raises(DataError, match="Scalars are not equal"), foreign_code(describe):
        torch.testing.assert_close(1, 2)
    namespace = {"__name__": "nestify.model.made_up"}
    exec("def check():\n    assert False, 'a bug of ours'", namespace)
    with pytest.raises(AssertionError, match="a bug of ours"), foreign_code(describe):
        namespace["check"]()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("head"), "KeyError: 'head'"),
        (ValueError(), "ValueError"),
        (ValueError("\n  first line\nsecond line"), "first line"),
        (ValueError("only an introduction:"), "only an introduction:"),
        (ValueError("It is one sentence."), "It is one sentence"),
        (ValueError("a b" + "x" * 1000), "a b" + "x" * 222 + " ...(1,003 characters)... " + "x" * 75),
    ],
)
def test_one_useful_line_is_kept(error: Exception, line: str) -> None:
    with pytest.raises(DataError) as caught, foreign_code(describe):
        raise error
    assert str(caught.value) == f"photos: {line}"


def test_the_keys_of_torchs_error_are_kept() -> None:
    with pytest.raises(DataError, match=r"Missing key.*weight"), foreign_code(describe):
        nn.Linear(2, 2).load_state_dict({})
