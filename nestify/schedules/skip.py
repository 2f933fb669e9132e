"""Which maskable weights a schedule leaves alone."""

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from nestify.errors import RecipeError
from nestify.model.spec import ModelSpec


def masked_names(spec: ModelSpec, skip: Sequence[str]) -> tuple[str, ...]:
    """Names of the weights that a schedule masks: the maskable ones without those left out.

    Args:
        spec: the model.
        skip: wildcards over module or parameter names (`*.conv_dw`, `blocks.0.*`), or the words `first`
            (first convolution), `classifier`, `depthwise`.

    Raises:
        RecipeError: for a pattern that matches nothing, or if nothing is left.
    """
    left_out: set[str] = set()
    problems = []
    for pattern in skip:
        found = _matches(spec, pattern)
        left_out |= found
        if not found:
            modules = sorted({name.rpartition(".")[0] for name in spec.maskable})
            close = get_close_matches(pattern.strip("*."), modules, n=3, cutoff=0.4) or modules[:3]
            problems.append(
                f"schedule.skip = {pattern!r} matches no maskable weight of {spec.architecture}; "
                f"its layers are named like {', '.join(close)}"
            )
    if problems:
        raise RecipeError(problems)
    names = tuple(name for name in spec.maskable if name not in left_out)
    if not names:
        raise RecipeError(f"schedule.skip = {list(skip)} leaves no weight of {spec.architecture} to mask")
    return names


def _matches(spec: ModelSpec, pattern: str) -> set[str]:
    if pattern == "depthwise":
        return set(spec.depthwise)
    layers = {"first": spec.first, "classifier": spec.classifier}.get(pattern)
    if layers is not None:
        return {name for name in spec.maskable if name.startswith(tuple(f"{layer}." for layer in layers))}
    return {
        name
        for name in spec.maskable
        if fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)
    }
