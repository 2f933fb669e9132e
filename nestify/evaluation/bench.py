"""Latency of the levels of a nested file on this machine."""

import os
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nestify.accelerator import clock_of, device_model, pick_device
from nestify.engine.export import engine_device, engine_runtime
from nestify.errors import BadFileError, RecipeError
from nestify.evaluation.on_engine import TIMED_IMAGES, Calibration, check_int8, level_opener
from nestify.file.measurements import (
    FLOAT32,
    INT8,
    TORCH,
    LevelLatency,
    Machine,
    Measurement,
    check_savable,
    save_measured,
)
from nestify.file.reader import open_nested_file
from nestify.file.summary import Report, make_report
from nestify.machine import cores, printable_line, processor_name
from nestify.shown import Shown


def this_machine(device: torch.device) -> Machine:
    """Describe this machine, as far as latencies on a device depend on it."""
    cpu = processor_name()
    return Machine(
        cpu=cpu,
        cores=cores(),
        device=device.type,
        device_name=printable_line(device_model(device)) or cpu,
        system=printable_line(f"{platform.system()} {platform.machine()}"),
        torch=printable_line(torch.__version__),
    )


LEAST_ROUNDS = 10
"""Smallest number of rounds, if no number was given."""

MOST_ROUNDS = 10_000

LEAST_WARM_UP = 2

Clock = Callable[[], float]
Times = Mapping[int, float]
Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Effort:
    """Duration of a measurement.

    Attributes:
        warmup: seconds of warm-up rounds, which do not count; at least two rounds.
        seconds: seconds of rounds that count; from 10 to 10,000 rounds.
        rounds: exact number of rounds, at least two; None for as many as fit into `seconds`.
    """

    warmup: float = 0.5
    seconds: float = 3.0
    rounds: int | None = None


@dataclass(frozen=True)
class Latency:
    """Latency of one call.

    Attributes:
        median: median in seconds.
        p95: 95th percentile in seconds.
        ratio: median, over the rounds, of its time divided by the reference's time in the same round.
        quartiles: first and third quartile of the same ratios.
        rounds: number of calls.
    """

    median: float
    p95: float
    ratio: float
    quartiles: tuple[float, float]
    rounds: int


def measure(
    calls: Mapping[int, Callable[[], object]], reference: int, effort: Effort, clock: Clock
) -> dict[int, Latency]:
    """Measure calls in turns, so that other work of the machine slows all of them alike.

    Args:
        calls: the calls, by level.
        reference: the level that the others are compared with.
        clock: returns seconds since a fixed moment, after waiting for work that a call has only started.
    """
    rounds = interleave(calls, effort, clock)
    return {level: _latency(rounds, level, reference) for level in calls}


def interleave(calls: Mapping[int, Callable[[], object]], effort: Effort, clock: Clock) -> list[Times]:
    """Run calls in turns, after a warm-up.

    Args:
        calls: the calls, by number.
        effort: how long.
        clock: see `measure`.

    Returns:
        The seconds of each call, by number, for each round.
    """
    _rounds(calls, clock, effort.warmup, LEAST_WARM_UP, MOST_ROUNDS)
    least, most = (LEAST_ROUNDS, MOST_ROUNDS) if effort.rounds is None else (effort.rounds, effort.rounds)
    return _rounds(calls, clock, effort.seconds, least, most)


def _rounds(
    calls: Mapping[int, Callable[[], object]], clock: Clock, seconds: float, least: int, most: int
) -> list[Times]:
    """Run rounds until the time is over; every second one runs backwards, so that no order is favoured."""
    start = clock()
    rounds: list[Times] = []
    while len(rounds) < least or (len(rounds) < most and clock() - start < seconds):
        order = list(calls)[:: -1 if len(rounds) % 2 else 1]
        rounds.append({level: _seconds(calls[level], clock) for level in order})
    return rounds


def _seconds(call: Callable[[], object], clock: Clock) -> float:
    start = clock()
    call()
    return clock() - start


def _latency(rounds: Sequence[Times], level: int, reference: int) -> Latency:
    times = [times[level] for times in rounds]
    ratios = [times[level] / times[reference] for times in rounds]
    first, ratio, third = statistics.quantiles(ratios, n=4, method="inclusive")
    return Latency(
        median=statistics.median(times),
        p95=statistics.quantiles(times, n=20, method="inclusive")[-1],
        ratio=ratio,
        quartiles=(first, third),
        rounds=len(rounds),
    )


USUAL_BATCHES = (1, 16)
MOST = 65_536
MOST_THREADS = 1024
MOST_SECONDS = 86_400
SEED = 0


@dataclass(frozen=True, repr=False)
class Bench(Shown):
    """Latencies of levels on this machine.

    Attributes:
        report: report of the file, for its MACs.
        measurements: one for each number of threads and batch size, in that order.
        saved: file in which they were saved; None if they were not.
    """

    path: str
    report: Report
    measurements: Sequence[Measurement]
    saved: Path | None = None


def bench(
    path: str | os.PathLike[str],
    *,
    level: int | str = "all",
    batch_sizes: Sequence[int] = USUAL_BATCHES,
    threads: Sequence[int] | None = None,
    device: str = "auto",
    warmup: float = Effort.warmup,
    seconds: float = Effort.seconds,
    rounds: int | None = None,
    save: bool = False,
    engine: bool = False,
    int8: bool = False,
    data: str | os.PathLike[str] | None = None,
    train_split: str | None = None,
    clock: Clock | None = None,
) -> Bench:
    """Measure the latency of levels for one batch of synthetic images, in turns with the full level.

    All measured levels are in memory at once, with the weights of the file, in eval and inference mode.

    Args:
        level: number or name of a level, or `all`; the full level is always measured.
        batch_sizes: numbers of images per call.
        threads: numbers of torch's CPU threads; None for the current number, which is restored afterwards.
        warmup: seconds of warm-up of each measurement.
        seconds: seconds of each measurement, at least 10 rounds.
        rounds: exact number of rounds in place of `seconds`.
        save: whether to save the measurements next to the file, as `resnet.bench.json`; earlier ones with
            the same machine, device, threads, batch size and dtype are replaced.
        engine: whether the sparse engine runs all levels, the full one too, on the CPU, in place of torch.
        int8: with `engine`, whether all levels are quantised to int8, the full one too.
        data: images to calibrate int8 on, as for `compress`; None for random ones.
        train_split: name of the split of `data` that they are taken from; None for `train`.
        clock: returns seconds since a fixed moment; None for wall time.

    Raises:
        NestifyError: if the file is not right, there is no such level or device, an option is out of its
            range, or the measurements cannot be saved.
    """
    effort = Effort(warmup, seconds, rounds)
    check_options(effort, batch_sizes, threads)
    file = open_nested_file(path)
    if save:
        check_savable(file)
    full = file.n_levels
    numbers = range(1, full + 1) if level == "all" else sorted({file.level_index(str(level)), full})
    where = pick_device(engine_device(device) if engine else device)
    runtime = engine_runtime() if engine else TORCH
    check_int8(int8, engine)
    calibration = None
    if int8:
        file.check_classifies("--int8")
        calibration = Calibration.open(file, data, TIMED_IMAGES, train_split=train_split)
    open_level = level_opener(file, where, engine, calibration)
    networks: dict[int, Network] = {}
    if not engine:
        networks = {number: open_level(number) for number in numbers}
    names = {number: file.manifest.levels[number - 1].name for number in numbers}
    input_size = file.manifest.model.preprocessing.input_size
    machine = this_machine(where)
    measurements = []
    for count in dict.fromkeys(threads or [torch.get_num_threads()]):
        with torch_threads(count):
            if engine:  # sessions have a fixed number of threads
                networks = {number: open_level(number) for number in numbers}
            for batch_size in dict.fromkeys(batch_sizes):
                generator = torch.Generator().manual_seed(SEED)
                images = torch.randn(batch_size, *input_size, generator=generator).to(where)
                measured = _measure_networks(networks, names, images, machine, effort, runtime, clock)
                measurements.append(measured.model_copy(update={"dtype": INT8}) if int8 else measured)
    saved = save_measured(file, measurements) if save else None
    return Bench(file.name, make_report(file), measurements, saved)


def saved_measurement(
    report: Report,
    batch_size: int,
    threads: Sequence[int] | None,
    device: str,
    engine: bool = False,
    int8: bool = False,
) -> Measurement:
    """Return what `bench` saved next to a file, on this machine and under these conditions.

    Raises:
        BadFileError: if there is none, with the command that makes it.
        RecipeError: if there is no such device, or an option is out of its range.
    """
    check_options(Effort(), (batch_size,), threads)
    check_int8(int8, engine)
    machine = this_machine(pick_device(engine_device(device) if engine else device))
    count = threads[0] if threads else torch.get_num_threads()
    wanted = (machine, count, batch_size, INT8 if int8 else FLOAT32, engine_runtime() if engine else TORCH)
    for measurement in report.measured:
        if measurement.conditions == wanted:
            return measurement
    problem = f" ({report.measured_problem})" if report.measured_problem else ""
    raise BadFileError(
        f"{report.path}: no latency of this machine at batch {batch_size} and {count} "
        f"thread{'s' * (count != 1)} is saved next to it{problem}; run `nestify bench` with --save "
        f"--batch-size {batch_size} --threads {count}{' --engine' * engine}{' --int8' * int8}, or leave "
        "--saved out"
    )


def _measure_networks(
    networks: Mapping[int, Network],
    names: Mapping[int, str],
    images: torch.Tensor,
    machine: Machine,
    effort: Effort,
    runtime: str,
    clock: Clock | None,
) -> Measurement:
    """Measure networks, by level, for one batch (B, C, H, W) on their device."""
    full = max(networks)
    calls = {number: partial(network, images) for number, network in networks.items()}
    with torch.inference_mode():
        found = measure(calls, full, effort, clock or clock_of(images.device))
    return Measurement(
        machine=machine,
        threads=torch.get_num_threads(),
        batch_size=len(images),
        dtype=FLOAT32,
        rounds=found[full].rounds,
        runtime=runtime,
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        levels=[
            LevelLatency(
                level=number,
                name=names[number],
                median_seconds=latency.median,
                p95_seconds=latency.p95,
                over_full=latency.ratio,
                over_full_quartiles=latency.quartiles,
            )
            for number, latency in found.items()
        ],
    )


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set the number of torch's CPU threads in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_options(effort: Effort, batch_sizes: Sequence[int], threads: Sequence[int] | None) -> None:
    """Refuse options that are out of their range.

    Raises:
        RecipeError: with the option and its range.
    """
    for option, values, most in (("batch-size", batch_sizes, MOST), ("threads", threads, MOST_THREADS)):
        if values is not None and not values:
            raise RecipeError(f"--{option} has no numbers; give one or more")
        for value in values or ():
            if not 1 <= value <= most:
                raise RecipeError(f"--{option} {value} is not from 1 to {most}")
    for option, seconds in (("warmup", effort.warmup), ("seconds", effort.seconds)):
        if not 0 <= seconds <= MOST_SECONDS:  # nor NaN
            raise RecipeError(f"--{option} {seconds:g} is not from 0 to {MOST_SECONDS} seconds")
    if effort.rounds is not None and not 2 <= effort.rounds <= MOST:
        raise RecipeError(f"--rounds {effort.rounds} is not from 2 to {MOST}")
