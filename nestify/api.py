"""What `import nestify` offers: load, compress, plan, evaluate, report."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import overload

from torch import nn

from nestify.compression import Run
from nestify.describe import block_units, describe
from nestify.errors import BadFileError, BudgetError, OutputError
from nestify.evaluation.accuracy import Accuracy
from nestify.evaluation.accuracy import evaluate as evaluate_networks
from nestify.hierarchy import stored_labels
from nestify.images import OnBadImage, eval_loader, open_images
from nestify.inputs import pick_device, pick_workers, stored_dtype
from nestify.loading import load_level, load_nested
from nestify.nested_file.manifest import Manifest
from nestify.nested_file.reader import open_nested_file
from nestify.nested_file.writer import write_nested_file
from nestify.nested_model import NestedModel
from nestify.planning import Plan
from nestify.recipe import Recipe, load_recipe
from nestify.training.observer import MetricsLog, Observer, Observers


@dataclass(frozen=True)
class Result:
    """What `compress` made: the file, and what it says of itself."""

    path: Path
    manifest: Manifest


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of levels of a file on images.

    Attributes:
        names: of the levels, in the order of `levels`. `classes`: how many each tells, and their name in the
            hierarchy, empty for the model's own.
        skipped: why images could not be read, by file name.
    """

    path: str
    data: str
    names: Sequence[str]
    classes: Sequence[tuple[int, str]]
    levels: Sequence[Accuracy]
    skipped: Mapping[str, str]


@overload
def load(path: str | os.PathLike[str], *, level: None = None, check: bool = True) -> NestedModel: ...


@overload
def load(path: str | os.PathLike[str], *, level: int | str, check: bool = True) -> nn.Module: ...


def load(
    path: str | os.PathLike[str], *, level: int | str | None = None, check: bool = True
) -> NestedModel | nn.Module:
    """Rebuild a nested model, or one level of it, on the CPU, in eval mode.

    Args:
        path: a nested file, or its address `https://`, `http://`, `hf://owner/repo/file`; a local path
            makes no network request.
        level: number or name of one level, which comes as a plain timm model: nothing is read beyond the
            level's prefix, and little memory is needed beyond the model's own. None: all levels.
        check: prove by its fingerprint that every level came out as it was stored.

    Raises:
        RecipeError: if there is no such level.
        BadFileError: if the file is damaged, or does not make the model that it names.
    """
    if level is None:
        return load_nested(open_nested_file(path), check=check)
    file = open_nested_file(path, truncated=True)
    file.check_whole(number := file.level_index(str(level)))
    return load_level(file, number, check=check)


def plan(
    recipe: Recipe | str, overrides: Mapping[str, object] | None = None, *, estimate: bool = False
) -> Plan:
    """What `compress` would do; opens model and images, trains nothing, writes nothing.

    Args:
        recipe: a recipe, or what `load_recipe` takes.
        overrides: options on top, where `recipe` is not a `Recipe`.
        estimate: try one small step for time and memory.
    """
    return Run(_recipe(recipe, overrides), Observer()).plan(estimate=estimate)


def compress(
    recipe: Recipe | str,
    overrides: Mapping[str, object] | None = None,
    *,
    observer: Observer | None = None,
) -> Result:
    """Turn a pretrained model into a nested file, with `metrics.jsonl` beside it.

    Args:
        recipe: a recipe, or what `load_recipe` takes: a path, a built-in recipe, a timm model.
        overrides: options on top, where `recipe` is not a `Recipe`.
        observer: told of progress.

    Raises:
        BudgetError: if a level came out at another cost than its budget; the file is written nevertheless.
        NestifyError: the kind says what was wrong; an older file at the output is then unchanged.
    """
    recipe = _recipe(recipe, overrides)
    watcher = observer or Observer()
    output = recipe.output_path
    _check_outputs(recipe)
    run = Run(recipe, watcher)
    watcher.planned(run.plan())
    with MetricsLog(metrics_path(output)) as log:
        run.observer = Observers([watcher, log])
        done = run.execute()
    watcher.stage(f"writing {output}")
    manifest = write_nested_file(
        output,
        done.nested.nested_state(block_units(done.nested, done.levels)),
        describe(
            recipe,
            done.levels,
            done.nested,
            done.costs,
            labels=done.labels,
            source_sha256=done.pretrained.source_sha256,
            original=done.original,
            before=done.before,
            after=done.after,
        ),
        stored_dtype(recipe),
        check=partial(_check_loads, output),
    )
    if done.missed:
        raise BudgetError(f"{'; '.join(done.missed)}; {output} was written")
    return Result(output, manifest)


def evaluate(
    path: str | os.PathLike[str],
    data: str,
    *,
    level: int | str = "all",
    split: str = "validation",
    data_root: str | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    device: str = "auto",
    max_images: int | None = None,
    on_bad_image: OnBadImage = "refuse",
    seed: int = 42,
) -> Evaluation:
    """Evaluate levels of a nested file; the file brings the model, its preprocessing and its classes.

    Args:
        data: images, as for `compress`.
        level: number, name, or `all`.
        split: `validation`, or what the data calls it.
        max_images: use at most so many, the classes as even as possible.
        seed: of the choice of `max_images`.

    Raises:
        NestifyError: if the file or the images are not right, or there is no such level.
    """
    file = open_nested_file(path, truncated=True)
    numbers = range(1, file.n_levels + 1) if level == "all" else [file.level_index(str(level))]
    file.check_whole(max(numbers))
    where = pick_device(device)
    model = file.manifest.model
    images = open_images(
        data,
        split,
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
        workers=pick_workers(workers, where),
        device=where,
    )
    # Level by level, so that each is in memory alone and timed by itself.
    parents = stored_labels(file.manifest).parents
    results = [
        evaluate_networks({k: load_level(file, k).to(where)}, loader, parents=parents)[0] for k in numbers
    ]
    entries = [file.manifest.levels[number - 1] for number in numbers]
    classes = [
        (file.manifest.num_classes(k), level.classes) for k, level in zip(numbers, entries, strict=True)
    ]
    names = [level.name for level in entries]
    return Evaluation(file.name, data, names, classes, results, dict(images.skipped))


def metrics_path(output: Path) -> Path:
    """Where the log of a run lies: `resnet.metrics.jsonl` beside `resnet.nested.safetensors`."""
    return output.with_name(
        output.name.removesuffix(".safetensors").removesuffix(".nested") + ".metrics.jsonl"
    )


def _recipe(recipe: Recipe | str, overrides: Mapping[str, object] | None) -> Recipe:
    if isinstance(recipe, Recipe):
        assert not overrides, "a Recipe is complete; overrides go with a recipe's name"
        return recipe
    return load_recipe(recipe, overrides)


def _check_outputs(recipe: Recipe) -> None:
    """Find out before the work, not after it, that a result has no place."""
    outputs = {"output": recipe.output_path}
    if recipe.finetune.save is not None:
        outputs["finetune.save"] = Path(recipe.finetune.save)
    inputs = [path for path in (recipe.model.checkpoint, recipe.train.teacher_checkpoint) if path is not None]
    for option, path in outputs.items():
        try:
            if path.is_dir():
                raise OutputError(f"{option} = {path} is a folder; give the path of a file in it")
            if path.exists() and not path.is_file():
                raise OutputError(f"{option} = {path} is not a regular file; choose another path")
            if path.exists() and any(os.path.exists(other) and path.samefile(other) for other in inputs):
                raise OutputError(f"{option} = {path} is the checkpoint of this run; choose another path")
            with TemporaryFile(dir=Path(os.path.realpath(path)).parent):
                pass
        except OSError as error:
            raise OutputError(
                f"{option} = {path} cannot be written ({error.strerror or error}); "
                "choose a folder that exists and can be written to"
            ) from error


def _check_loads(output: Path, written: Path) -> None:
    """What cannot be loaded again must not replace what was there."""
    try:
        load(written)
    except BadFileError as error:
        raise OutputError(
            f"{output}: what was written does not load again, so it was not kept: {error}"
        ) from error
