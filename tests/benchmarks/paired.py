"""Predictions of methods on the same test images: files, paired differences and their standard errors."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Classes = NDArray[np.int64]


@dataclass(frozen=True)
class Difference:
    """Difference of two accuracies on the same images.

    Attributes:
        points: mean difference, in percentage points.
        error: standard error of the mean over the images, in percentage points.
    """

    points: float
    error: float

    def __str__(self) -> str:
        return f"{self.points:+.2f} ± {self.error:.2f}"


@dataclass(frozen=True)
class MethodRun:
    """What one run of a method left: predictions of its levels, and facts about its training.

    Attributes:
        labels: class of each test image, (images,).
        predictions: by level, counted from 1: the predicted classes, (images,).
        facts: numbers of the training, to show that the methods had the same.
    """

    labels: Classes
    predictions: Mapping[int, Classes]
    facts: Mapping[str, Any]

    def top1(self, level: int) -> float:
        """Return the top-1 accuracy of a level in percent."""
        return float((self.predictions[level] == self.labels).mean() * 100)

    def save(self, path: Path) -> None:
        """Write the run as one npz file, which is complete or does not exist."""
        arrays = {f"level{level}": classes for level, classes in self.predictions.items()}
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez_compressed(file, labels=self.labels, facts=np.array(json.dumps(self.facts)), **arrays)
        os.replace(partial, path)

    @classmethod
    def read(cls, path: Path) -> "MethodRun":
        """Read what `save` wrote."""
        with np.load(path) as file:
            levels = {int(key[5:]): file[key] for key in file.files if key.startswith("level")}
            return cls(file["labels"], levels, json.loads(str(file["facts"])))


def paired_difference(
    first: Sequence[Classes], second: Sequence[Classes], labels: Sequence[Classes]
) -> Difference:
    """Return the accuracy of one method less that of another on the same images.

    The standard error is the standard deviation of the per-image difference of correctness, divided by the
    square root of the number of images. Several runs (seeds) of a method are averaged by image first, so the
    error is that of the images alone, not of the choice of seeds. If each run has images of its own, as many
    as the others, that is the error of all of them together; runs of different lengths are put in a row.

    Args:
        first, second: predicted classes of each run, (images,); run i of both has the same seed and images.
        labels: class of each image of each run, (images,).
    """
    runs = [
        (one == true).astype(float) - (two == true)
        for one, two, true in zip(first, second, labels, strict=True)
    ]
    alike = len({len(run) for run in runs}) == 1
    by_image = np.mean(runs, axis=0) if alike else np.concatenate(runs)
    return Difference(
        float(by_image.mean() * 100), float(by_image.std(ddof=1) / np.sqrt(len(by_image)) * 100)
    )


Runs = Mapping[str, Mapping[int, MethodRun]]
"""By method and seed."""


def comparison_rows(runs: Runs, names: Sequence[str], base: str) -> Iterator[list[str]]:
    """Yield a table's rows: for each level, the accuracy of each method and the base method less it.

    Args:
        runs: the runs of all methods.
        names: names of the levels, core first.
        base: the method that the others are compared with.
    """
    for level, name in enumerate(names, start=1):
        for method, by_seed in runs.items():
            seeds = [seed for seed, run in by_seed.items() if level in run.predictions]
            if not seeds:
                continue
            top1 = [f"{by_seed[seed].top1(level):.2f}" for seed in seeds]
            both = [seed for seed in seeds if level in _levels_of(runs, base, seed)]
            differences = [""] * 2
            if both and method != base:
                each = [_difference(runs, base, method, level, [seed]) for seed in both]
                differences = [", ".join(map(str, each)), str(_difference(runs, base, method, level, both))]
            facts = by_seed[seeds[0]].facts
            cost = f"{facts['nonzero'][str(level)]:,}", f"{facts['macs'][str(level)]:,}"
            yield [name, method, *cost, ", ".join(top1), *differences]


def best_rows(runs: Runs, names: Sequence[str], rivals: Sequence[str]) -> Iterator[list[str]]:
    """Yield a table's rows: for each level, nested next to the rival with the best mean over the same seeds.

    Args:
        runs: the runs of all methods.
        names: names of the levels, core first.
        rivals: names of methods; those that did not run are left out.
    """
    for level, name in enumerate(names, start=1):
        found = []
        for rival in rivals:
            seeds = [
                seed
                for seed in runs["nested"]
                if all(level in _levels_of(runs, method, seed) for method in ("nested", rival))
            ]
            if seeds:
                found.append((_mean_top1(runs, rival, level, seeds), rival, seeds))
        if found:
            top1, rival, seeds = max(found)
            own = f"{_mean_top1(runs, 'nested', level, seeds):.2f}"
            yield [name, own, f"{rival}, {top1:.2f}", str(_difference(runs, "nested", rival, level, seeds))]


def _mean_top1(runs: Runs, method: str, level: int, seeds: Sequence[int]) -> float:
    return float(np.mean([runs[method][seed].top1(level) for seed in seeds]))


def _levels_of(runs: Runs, method: str, seed: int) -> Mapping[int, Classes]:
    run = runs.get(method, {}).get(seed)
    return {} if run is None else run.predictions


def _difference(runs: Runs, first: str, second: str, level: int, seeds: Sequence[int]) -> Difference:
    one, two = ([runs[name][seed].predictions[level] for seed in seeds] for name in (first, second))
    return paired_difference(one, two, [runs[first][seed].labels for seed in seeds])


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)
