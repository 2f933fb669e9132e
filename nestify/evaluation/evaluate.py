"""Evaluation of a nested file on images: of each level, of a consensus of levels, and of a cascade."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from torch import Tensor

from nestify.accelerator import pick_device
from nestify.data.hierarchy import stored_class_levels
from nestify.data.loaders import Loader, eval_loader
from nestify.data.validation import UsedImages, open_evaluation_images, recorded_split
from nestify.engine.export import engine_device
from nestify.errors import RecipeError
from nestify.evaluation.agreement import Replay
from nestify.evaluation.cascade import Cascade
from nestify.evaluation.class_counts import ClassCounter, ClassCounts, Passes
from nestify.evaluation.comparison import check_comparable, choose_metric, open_reference
from nestify.evaluation.consensus import Consensus, Network, Recorder
from nestify.evaluation.joint import JointEvaluation
from nestify.evaluation.measure import Score, measure
from nestify.evaluation.on_engine import CALIBRATION_IMAGES, Calibration, check_int8, level_opener
from nestify.evaluation.runtimes import SATURATES, sums_saturate
from nestify.file.class_accuracy import LevelClasses, check_evaluation_savable, save_class_accuracy
from nestify.file.reader import NestedFile, open_nested_file
from nestify.machine import pick_workers, workers_warning
from nestify.recipe.metric import TOP1, Metric
from nestify.recipe.options import ConsensusKind, OnBadImage
from nestify.shown import Shown
from nestify.terminal import Progress, find_caller, shown_progress


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """What levels of a file are judged by on images: accuracy, or without labels likeness to a reference.

    Attributes:
        path: the file.
        data: the images, as given.
        names: names of the levels, in the order of `levels`.
        classes: per level, the number of classes that it predicts, and their name in the hierarchy, which
            is empty for the model's own classes.
        levels: result of each level: an `Accuracy`, with several labels per image a `Precision`, without
            labels an `Agreement` or, of a backbone, a `Similarity`.
        skipped: why images could not be read, by file name.
        images: which images were used.
        consensus: accuracy of levels 1 to 2, 1 to 3, ... together; empty if not requested.
        cascade: one entry per threshold; empty if not requested.
        calibrated: whether the file holds the temperatures that make confidences probabilities.
        full_macs: dense and effective MACs of the highest of these levels, per image.
        warnings: sentences about what may be wrong.
        by_class: numbers of images and of correct predictions of each level, by class.
        saved: file in which the accuracy by class was saved; None if it was not.
        reference: what the levels were compared with, without labels; empty with labels.
    """

    path: str
    data: str
    names: Sequence[str]
    classes: Sequence[tuple[int, str]]
    levels: Sequence[Score]
    skipped: Mapping[str, str]
    images: UsedImages
    consensus: Sequence[Consensus] = ()
    cascade: Sequence[Cascade] = ()
    calibrated: bool = False
    full_macs: tuple[int | None, int | None] = (None, None)
    warnings: Sequence[str] = ()
    by_class: Sequence[ClassCounts] = ()
    saved: Path | None = None
    reference: str = ""


def evaluate(
    path: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    level: int | str = "all",
    consensus: ConsensusKind | None = None,
    cascade: float | str | None = None,
    split: str | None = None,
    all_images: bool = False,
    unlabelled: bool = False,
    labels: str | os.PathLike[str] | None = None,
    original: str | os.PathLike[str] | None = None,
    data_root: str | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    device: str = "auto",
    max_images: int | None = None,
    on_bad_image: OnBadImage = "refuse",
    seed: int = 42,
    save: bool = False,
    progress: Progress | None = None,
    engine: bool = False,
    int8: bool = False,
    calibrate_images: int = CALIBRATION_IMAGES,
    train_split: str | None = None,
    reduce_range: bool = False,
) -> Evaluation:
    """Evaluate levels of a nested file, which contains the model, its preprocessing and its classes.

    Args:
        data: images, as for `compress`.
        path: the nested file, or its address.
        level: number or name of a level, or `all`.
        consensus: also evaluate the levels together: by the `mean` of their probabilities, or with the
            `learned` weights of the file.
        cascade: also evaluate, for each image, the first level that is confident enough: a threshold such as
            0.8, `macs=0.5` (the highest threshold whose mean effective MACs are at most half of the full
            level's), or `sweep`. With `level`, consensus and cascade use the levels up to that one.
        split: name of the split; None for `validation`, or else the split that the file was validated on. Of
            the split that the file's validation images were held out of, only the held-out images are used;
            see `all_images`.
        all_images: whether to use the images that the levels were trained on too.
        unlabelled: whether to use no labels: each level is compared with the file's full level, or with
            `original`. The images may be in any folder.
        labels: CSV table of the labels of each image, of which it may have several; the levels are then
            judged by their mean average precision.
        original: checkpoint of the original model, to compare the levels with it; needs `unlabelled`.
        data_root: folder of a named data set.
        batch_size: images per forward pass.
        workers: number of processes that load images; None chooses.
        device: device to compute on; `auto` chooses.
        max_images: maximum number of images, balanced over the classes.
        on_bad_image: whether to `refuse` or `skip` an unreadable image.
        seed: seed of the choice of `max_images`.
        save: whether to save the accuracy by class next to the file, as `resnet.eval.json`; an earlier one is
            replaced.
        progress: called after each batch with the images that were evaluated, counted for each level, and
            their total; None shows a bar at a terminal and in a notebook.
        engine: whether the sparse engine computes the logits, on the CPU, in place of torch.
        int8: with `engine`, whether it computes in int8, as `nestify.export` writes it with sparse layers.
        calibrate_images: number of training images to calibrate int8 on, balanced over the classes.
        train_split: name of the split that they are taken from; None for `train`.
        reduce_range: whether weights of dense int8 layers have 7 bits, with which sums saturate on no
            processor.

    Raises:
        NestifyError: if the file or the images are not right, or there is no such level or option, or the
            accuracy by class cannot be saved.

    Warns:
        NestifyWarning: at the caller's line, with each of the result's warnings.
    """
    data = os.fspath(data)
    _check(batch_size, workers, on_bad_image, seed)
    file = open_nested_file(path, truncated=True)
    numbers = range(1, file.n_levels + 1) if level == "all" else [file.level_index(str(level))]
    joint = JointEvaluation(file.manifest.levels[: max(numbers)], consensus, cascade)
    labels = None if labels is None else os.fspath(labels)
    options = {"--consensus": consensus, "--cascade": cascade, "--save": save}
    metric = choose_metric(
        file, numbers, "nestify eval", labels=labels, unlabelled=unlabelled, options=options
    )
    if save:
        check_evaluation_savable(file)
    if unlabelled:
        check_comparable(file, numbers)
    elif original is not None:
        raise RecipeError("--original is what levels are compared with without labels; add --unlabelled")
    if joint.is_requested:
        numbers = range(1, max(numbers) + 1)
    file.check_whole(file.n_levels if unlabelled and original is None else max(numbers))
    where = pick_device(engine_device(device) if engine else device)
    workers = pick_workers(workers, where)
    check_int8(int8, engine, reduce_range)
    calibration = None
    if int8:
        calibration = Calibration.open(
            file,
            data,
            calibrate_images,
            train_split=train_split,
            labels=labels,
            data_root=data_root,
            labelled=not unlabelled,
        )
    model = file.manifest.model
    open_level = level_opener(file, where, engine, calibration, reduce_range)
    images, used = open_evaluation_images(
        data,
        split,
        file.manifest.held_out,
        recorded_split(file.manifest.recipe),
        all_images=all_images,
        labelled=not unlabelled,
        labels=labels,
        data_root=data_root,
        class_names=model.class_names,
        num_classes=model.num_classes,
        on_bad_image=on_bad_image,
        max_images=max_images,
        seed=seed,
    )
    loader = eval_loader(
        images,
        model.preprocessing.model_dump(),
        batch_size=batch_size,
        workers=workers,
        device=where,
    )
    recorder = Recorder() if joint.is_requested else None
    parents = stored_class_levels(file.manifest).parents
    counters = [ClassCounter(file.manifest.num_classes(k), parents.get(k)) for k in numbers]
    with shown_progress(progress, "images") as advance:
        passes = Passes(len(images) * len(numbers), advance)
        reference = Replay(open_reference(file, original, loader)) if unlabelled else None
        results = [
            _evaluate_level(open_level, number, loader, metric, reference, recorder, parents, counter, passes)
            for number, counter in zip(numbers, counters, strict=True)
        ]
    entries = [file.manifest.levels[number - 1] for number in numbers]
    found: tuple[Sequence[Consensus], Sequence[Cascade]] = ((), ())
    if recorder is not None:
        found = joint.evaluate(recorder.predictions(parents, model.num_classes))
    by_class = [] if metric is not TOP1 else [counter.counts() for counter in counters]
    saturation = SATURATES if int8 and not reduce_range and sums_saturate() else None
    notices = [images.order_notice, workers_warning(workers), saturation]
    warnings = [*images.notices, *filter(None, notices)]
    for text in warnings:
        find_caller().warn(text)
    return Evaluation(
        path=file.name,
        data=data,
        names=[entry.name for entry in entries],
        classes=[
            (file.manifest.num_classes(k), entry.classes) for k, entry in zip(numbers, entries, strict=True)
        ],
        levels=results,
        skipped=dict(images.skipped),
        images=used,
        consensus=found[0],
        cascade=found[1],
        calibrated=joint.calibrated,
        full_macs=joint.macs[-1],
        warnings=warnings,
        by_class=by_class,
        saved=_save(file, data, numbers, by_class) if save else None,
        reference="" if not unlabelled else "the full level" if original is None else os.fspath(original),
    )


def _check(batch_size: int, workers: int | None, on_bad_image: str, seed: int) -> None:
    """Refuse options that the command line does not let through.

    Raises:
        RecipeError: with a sentence for each.
    """
    kinds = get_args(OnBadImage)
    numbers = {"--batch-size": (batch_size, 1), "--workers": (workers or 0, 0), "seed": (seed, 0)}
    problems = [
        f"{option} {value} is less than {least}; give {least} or more"
        for option, (value, least) in numbers.items()
        if value < least
    ]
    if on_bad_image not in kinds:
        problems.append(f"--on-bad-image {on_bad_image} is not {' or '.join(kinds)}")
    if problems:
        raise RecipeError(problems)


def _evaluate_level(
    open_level: Callable[[int], Network],
    level: int,
    loader: Loader,
    metric: Metric,
    reference: Replay | None,
    recorder: Recorder | None,
    parents: Mapping[int, Tensor],
    counter: ClassCounter,
    passes: Passes,
) -> Score:
    """Evaluate one level, which is alone in memory and timed separately."""
    network = open_level(level)
    batches = passes.watch_batches(loader)
    if reference is not None:
        batches = reference.watch_batches(batches)
    if metric is TOP1:
        batches = counter.watch_batches(batches)
        if recorder is not None:
            network = recorder.record_logits(level, network)
            batches = recorder.record_targets(batches)
        network = counter.watch_network(network)
    return measure({level: network}, batches, metric, reference=reference, parents=parents)[0]


def _save(file: NestedFile, data: str, numbers: Sequence[int], by_class: Sequence[ClassCounts]) -> Path:
    """Save the accuracy by class of levels next to their file, and return the path of the document."""
    levels = [
        LevelClasses(
            level=number,
            name=file.manifest.levels[number - 1].name,
            images=list(counts.images),
            correct=list(counts.correct),
        )
        for number, counts in zip(numbers, by_class, strict=True)
    ]
    return save_class_accuracy(file, data, levels)
