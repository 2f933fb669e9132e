"""Latency of sparse levels next to the dense models of other runtimes: float32 and int8, on the CPU."""

import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from nestify.accelerator import clock_of, pick_device
from nestify.engine.export import engine_network, engine_runtime
from nestify.errors import NestifyError, RecipeError, SetupError
from nestify.evaluation.bench import (
    USUAL_BATCHES,
    Effort,
    Times,
    check_options,
    interleave,
    this_machine,
    torch_threads,
)
from nestify.evaluation.on_engine import TIMED_IMAGES, Calibration, int8_network
from nestify.evaluation.runtimes import RUNTIMES, Call, Images, quantise
from nestify.exports.draft import Runner, quiet
from nestify.exports.onnx import translate
from nestify.exports.target import INT8_PATTERN, ExportFacts
from nestify.file.loading import load_level
from nestify.file.measurements import FLOAT32, INT8, Machine
from nestify.file.reader import NestedFile, open_nested_file
from nestify.file.summary import Report, make_report

SEED = 0

Prepare = Callable[[Images, int], Call]
"""Loads a network for a batch (B, C, H, W) and a number of threads, and returns a call that runs it."""


@dataclass(frozen=True)
class Contender:
    """One network on one runtime.

    Attributes:
        level: number of the level, 1 for the core level.
        runtime: what runs it, with its version.
        dtype: type that it computes in: float32 or int8.
    """

    level: int
    runtime: str
    dtype: str


@dataclass(frozen=True)
class Timing:
    """Time of one contender.

    Attributes:
        contender: what ran.
        p25_seconds: first quartile of the seconds for one batch, which other load disturbs least.
        p75_seconds: third quartile.
    """

    contender: Contender
    p25_seconds: float
    p75_seconds: float


@dataclass(frozen=True)
class Match:
    """Contenders that took turns.

    Attributes:
        threads: number of threads of each runtime.
        batch_size: images per call.
        rounds: number of calls of each contender.
        timings: one for each contender.
    """

    threads: int
    batch_size: int
    rounds: int
    timings: Sequence[Timing]

    def over_best(self, timing: Timing, dtype: str, full: int) -> float | None:
        """Return a time divided by that of the fastest dense network of a type; None if there is none.

        Args:
            timing: the time, of this match.
            dtype: float32 or int8.
            full: number of the full level.
        """
        dense = [
            each.p25_seconds
            for each in self.timings
            if each.contender.level == full and each.contender.dtype == dtype
        ]
        return timing.p25_seconds / min(dense) if dense else None


@dataclass(frozen=True)
class Rivals:
    """Times of levels and of their rivals on this machine.

    Attributes:
        path: the file.
        report: report of the file.
        machine: this machine.
        calibration: where the images came from that int8 models were calibrated on.
        matches: one for each number of threads and batch size, in that order.
        skipped: a sentence for each contender that could not run.
    """

    path: str
    report: Report
    machine: Machine
    calibration: str
    matches: Sequence[Match]
    skipped: Sequence[str]


def bench_rivals(
    path: str | os.PathLike[str],
    *,
    level: int | str = "all",
    batch_sizes: Sequence[int] = USUAL_BATCHES,
    threads: Sequence[int] | None = None,
    device: str = "auto",
    warmup: float = Effort.warmup,
    seconds: float = Effort.seconds,
    rounds: int | None = None,
    data: str | os.PathLike[str] | None = None,
    train_split: str | None = None,
) -> Rivals:
    """Measure levels in torch and on the sparse engine, in turns with the full level on other runtimes.

    ONNX Runtime and, if it is installed, OpenVINO run the full level in float32 and in int8, quantised per
    channel after calibration. Levels whose weights are in groups of four inputs (pattern 1x4) run on the
    engine in int8 too.

    Args:
        path: a nested file, or its address.
        level: number or name of a level, or `all`; the full level always runs.
        batch_sizes: numbers of images per call.
        threads: numbers of threads; None for torch's current number.
        device: `auto` or `cpu`.
        warmup: seconds of warm-up of each measurement.
        seconds: seconds of each measurement, at least 10 rounds.
        rounds: exact number of rounds in place of `seconds`.
        data: images that int8 models are calibrated on; None for random ones.
        train_split: name of the split of `data` that they are taken from; None for `train`.

    Raises:
        NestifyError: if the file, the images or an option is not right, or the full level cannot be exported.
    """
    effort = Effort(warmup, seconds, rounds)
    check_options(effort, batch_sizes, threads)
    if device not in ("auto", "cpu"):
        raise RecipeError(f"--rivals measures on the CPU, not on --device {device}; leave one of them out")
    file = open_nested_file(path)
    full = file.n_levels
    numbers = range(1, full + 1) if level == "all" else sorted({file.level_index(str(level)), full})
    skipped: list[str] = []
    calibration = Calibration.open(file, data, TIMED_IMAGES, train_split=train_split)
    with tempfile.TemporaryDirectory(prefix="nestify-rivals-") as folder:
        entrants = {
            **_levels(file, numbers, calibration, skipped),
            **_dense(file, Path(folder), calibration, skipped),
        }
        matches = [
            _match(entrants, file.manifest.model.preprocessing.input_size, size, count, effort, skipped)
            for count in dict.fromkeys(threads or [torch.get_num_threads()])
            for size in dict.fromkeys(batch_sizes)
        ]
    return Rivals(
        path=file.name,
        report=make_report(file),
        machine=this_machine(pick_device("cpu")),
        calibration=calibration.source,
        matches=matches,
        skipped=skipped,
    )


def _levels(
    file: NestedFile, numbers: Sequence[int], calibration: Calibration, skipped: list[str]
) -> dict[Contender, Prepare]:
    """Return the levels in torch and on the engine; what cannot run adds a sentence to `skipped`."""
    entrants: dict[Contender, Prepare] = {}
    for number in numbers:
        network = load_level(file, number)
        entrants[Contender(number, f"torch {torch.__version__}", FLOAT32)] = partial(_on_torch, network)
    try:
        runtime = engine_runtime()
    except SetupError as error:
        skipped.append(f"Sparse engine: {error}.")
        return entrants
    in_int8 = partial(int8_network, file, images=calibration.images)
    for number in numbers[:-1]:
        entrants[Contender(number, runtime, FLOAT32)] = _on_engine(partial(engine_network, file), number)
        if file.manifest.levels[number - 1].pattern == INT8_PATTERN:
            entrants[Contender(number, runtime, INT8)] = _on_engine(in_int8, number)
    return entrants


def _on_engine(open_level: Callable[[int], Runner], number: int) -> Prepare:
    """Return what loads a level when the number of threads is set."""

    def prepare(images: Images, threads: int) -> Call:
        return partial(open_level(number), torch.from_numpy(images))

    return prepare


def _dense(
    file: NestedFile, folder: Path, calibration: Calibration, skipped: list[str]
) -> dict[Contender, Prepare]:
    """Return the full level on other runtimes; what cannot run adds a sentence to `skipped`."""
    full = file.n_levels
    model = translate(load_level(file, full), ExportFacts.for_level(file.manifest, full), None, None)
    paths = {FLOAT32: folder / "float32.onnx"}
    paths[FLOAT32].write_bytes(model.SerializeToString())
    try:
        quantise(paths[FLOAT32], folder / "int8.onnx", calibration.images.numpy())
        paths[INT8] = folder / "int8.onnx"
    except SetupError as error:
        skipped.append(f"int8: {error}.")
    entrants: dict[Contender, Prepare] = {}
    for name, prepare in RUNTIMES.items():
        try:
            with quiet():
                package = import_module(name)
        except ImportError:
            skipped.append(f"{name} is not installed; pip install {name}.")
            continue
        version = str(package.__version__).partition("-")[0]
        for dtype, path in paths.items():
            entrants[Contender(full, f"{name} {version}", dtype)] = partial(prepare, path)
    return entrants


def _match(
    entrants: Mapping[Contender, Prepare],
    input_size: Sequence[int],
    batch_size: int,
    threads: int,
    effort: Effort,
    skipped: list[str],
) -> Match:
    images = random_images(batch_size, input_size)
    contenders: list[Contender] = []
    calls: dict[int, Call] = {}
    with torch_threads(threads), torch.inference_mode():
        for contender, prepare in entrants.items():
            try:
                calls[len(calls)] = prepare(images, threads)
            except NestifyError as error:
                skipped.extend(text for text in [f"{error}."] if text not in skipped)
            else:
                contenders.append(contender)
        rounds = interleave(calls, effort, clock_of(torch.device("cpu")))
    timings = [timing(contender, rounds, number) for number, contender in enumerate(contenders)]
    return Match(threads, batch_size, len(rounds), timings)


def timing(contender: Contender, rounds: Sequence[Times], number: int) -> Timing:
    """Return the quartiles of a contender's times.

    Args:
        contender: the contender.
        rounds: seconds of each round, by number of the contender.
        number: number of the contender.
    """
    first, _, third = statistics.quantiles([times[number] for times in rounds], n=4, method="inclusive")
    return Timing(contender, first, third)


def random_images(count: int, input_size: Sequence[int]) -> Images:
    """Return images (count, C, H, W) of normally distributed values, always the same."""
    return np.random.default_rng(SEED).standard_normal((count, *input_size), np.float32)


def _on_torch(network: torch.nn.Module, images: Images, threads: int) -> Call:
    return partial(network, torch.from_numpy(images))
