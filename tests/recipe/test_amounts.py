"""Budgets as users write them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestify.recipe.amounts import Budget, Limited, parse_amount, parse_budget


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("macs=0.25", Budget("macs", 0.25, True)),
        ("macs = .5", Budget("macs", 0.5, True)),
        ("macs=100M", Budget("macs", 1e8, False)),
        ("macs=1.5g", Budget("macs", 1.5e9, False)),
        ("params=2M", Budget("params", 2e6, False)),
        ("params=250000", Budget("params", 250_000, False)),
        ("params=0.1", Budget("params", 0.1, True)),
        ("params=0.5M", Budget("params", 500_000, False)),
        ("bytes=4MB", Budget("bytes", 4e6, False)),
        ("bytes=4MiB", Budget("bytes", 4 * 2**20, False)),
        ("bytes=1024", Budget("bytes", 1024, False)),
        ("bytes=1e-1", Budget("bytes", 0.1, True)),
        ("latency=0.3", Budget("latency", 0.3, True)),
        ("latency = .05", Budget("latency", 0.05, True)),
    ],
)
def test_a_budget_is_read(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    "text",
    [
        "macs",
        "macs=",
        "macs=-1",
        "flops=2",
        "macs=4MB",
        "params=2X",
        "bytes=4M",
        "macs=0.5.5",
        "",
        "macs=\u0665",
    ],
)
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=f"^budget {re.escape(repr(text))} is not understood; give macs=0.25"
    ):
        parse_budget(text)


@pytest.mark.parametrize("text", ["latency=10ms", "latency=2", "latency=1"])
def test_a_latency_is_a_share(text: str) -> None:
    with pytest.raises(ValueError, match="give one below 1"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["macs=0", "params=0.0", "bytes=1e999", "latency=0"])
def test_a_budget_is_above_0_and_finite(text: str) -> None:
    with pytest.raises(ValueError, match="is not above 0"):
        parse_budget(text)


@given(st.sampled_from(["macs", "params", "bytes"]), st.integers(1, 10**12))
def test_a_written_budget_is_read_again(quantity: str, amount: int) -> None:
    budget = parse_budget(f"{quantity}={amount}")
    again = parse_budget(str(budget))
    assert (again.quantity, again.is_share) == (quantity, False)
    assert again.amount == pytest.approx(amount, rel=1e-5)  # six digits are shown


@pytest.mark.parametrize(
    ("limited", "text", "amount"),
    [
        ("latency", "10ms", 0.01),
        ("latency", "0.5 s", 0.5),
        ("latency", "800us", 8e-4),
        ("bytes", "4MB", 4e6),
        ("bytes", "4MiB", 4 * 2**20),
        ("macs", "0.5", 0.5),  # no share here
        ("macs", "1G", 1e9),
        ("params", "2M", 2e6),
        ("top1", "70", 70),
        ("top1", "70.5%", 70.5),
    ],
)
def test_an_amount_is_read(limited: Limited, text: str, amount: float) -> None:
    assert parse_amount(limited, text) == pytest.approx(amount, rel=1e-12)


@pytest.mark.parametrize(
    ("limited", "text"),
    [
        ("latency", "10"),
        ("latency", "10min"),
        ("latency", "-1ms"),
        ("latency", "nan"),
        ("bytes", "inf"),
        ("bytes", ""),
        ("macs", "1 000"),
        ("top1", "7M"),
    ],
)
def test_what_is_no_amount_is_refused(limited: Limited, text: str) -> None:
    with pytest.raises(ValueError, match="is not understood"):
        parse_amount(limited, text)


@pytest.mark.parametrize("text", ["0ms", "0.0s", "1e999s"])
def test_an_amount_is_above_0_and_finite(text: str) -> None:
    with pytest.raises(ValueError, match="is not above 0 and finite"):
        parse_amount("latency", text)
