"""Compares nested levels with each level alone, torch's pruning and Torch-Pruning, on the same test images.

    OMP_NUM_THREADS=1 python tests/benchmarks/rivals.py --model resnet18 --checkpoint tuned.safetensors \\
        --data photos --val-split test --max-train 5000 --epochs 4 --lr 0.02 --seeds 1,2 \\
        --schedule weight --levels 0.95,0.8,0 --output rivals-weight

The checkpoint must predict the classes of the data; fine-tune it first, as `nestify compress --epochs 0
--set finetune.save=tuned.safetensors` does. All methods start from it, and read the same images in the same
order with the same augmentation; optimizer, learning rate, schedule, passes, teacher and loss are the same.
The first table that is printed shows it, with a checksum of all pixels that each training read.

nested: all levels together. alone: nestify with this level's weight 1 and the others' 0. dense: plain
fine-tuning, the rival of the full level. once, gradual: `torch.nn.utils.prune.global_unstructured` with L1,
before training or in 20 rounds over its first half. torch-pruning: magnitude importance, the same ratio in
every layer, and the MACs of the level (`pip install torch-pruning`).

The output folder receives one npz file per run, which is not run again if it exists, the nested files, and
predictions.npz: the classes of the test images of each seed as `seed1/labels`, and the predicted ones of each
method as `seed1/nested/level2`, so that any pair can be compared. Exits with 1 if a method failed, and with 2
if an option is not right.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

import nestify
from nestify.recipe.level_options import DEFAULT_LEVELS, QUANTITY
from nestify.recipe.sources import parse_setting
from tests.benchmarks.paired import MethodRun, Runs, best_rows, comparison_rows, print_table
from tests.benchmarks.rival_methods import Contest
from tests.benchmarks.rival_pruning import RIVALS, leave_dense

NESTIFY_METHODS = ("nested", "alone", "dense")
METHODS = (*NESTIFY_METHODS, *(name for rivals in RIVALS.values() for name in rivals))
UNSUPPORTED = (
    *("mixup", "cutmix", "clip_grad", "ema_decay", "amp", "compile"),
    *("loss", "class_weights", "accumulate", "bn", "tf32", "cudnn_benchmark"),
)
"""Options that the rivals' loop does not have, so that they must have their defaults."""

Job = Callable[[], MethodRun]


def main() -> int:
    """Run what is missing, print the tables and write the predictions."""
    options = _options()
    try:
        settings = dict(parse_setting(text) for text in options.set)
        variants = {name: dict(map(parse_setting, changes)) for name, *changes in options.variant}
        folder = _open_folder(options, settings, variants)
        runs, names, failed = _run_all(options, settings, variants, folder)
    except nestify.NestifyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not runs:
        return 1
    _print_equality(runs)
    titles = ["level", "method", "non-zero", "effective MACs", "top-1 %", "by seed", "all seeds"]
    base = "nested" if "nested" in runs else next(iter(runs))
    titles[5:] = [f"{base} less it, by seed", "all seeds"]
    print_table(titles, list(comparison_rows(runs, names, base)))
    if base == "nested":
        rivals = ("dense", *RIVALS[options.schedule])
        print_table(
            ["level", "nested, top-1 %", "best rival", "nested less it"], list(best_rows(runs, names, rivals))
        )
    print(
        "± is the standard error over the test images, paired; the choice of seeds is not in it. "
        f"Predictions: {folder / 'predictions.npz'}"
    )
    _write_predictions(folder, runs)
    return int(failed)


def _options() -> argparse.Namespace:
    first, _, rest = str(__doc__).partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="timm model, or a recipe")
    add("--checkpoint", help="its fine-tuned weights; those of the recipe, or timm's own, by default")
    add("--data", help="folder with the splits as class folders or tars, as nestify takes it")
    add("--train-split", help="default train")
    add("--val-split", help="split to compare on; default validation, or held-out training images")
    add("--input-size", type=int, help="image size in pixels; the model's own by default")
    add("--max-train", type=int, help="number of training images; all by default")
    add("--epochs", type=float, default=4.0, help="passes over them (default 4)")
    add("--lr", type=float, default=0.02, help="learning rate of all methods (default 0.02)")
    add("--opt", help="timm's name of the optimizer; default sgd")
    add("--batch-size", type=int, help="default 64")
    add("--schedule", choices=tuple(RIVALS), default="weight", help="default weight")
    add("--levels", help="sparsities, widths or depths, core first; default as nestify compress")
    add(
        "--seeds",
        type=_numbers,
        default=[1, 2],
        help="default 1,2; a seed chooses images, order and augmentation",
    )
    add("--methods", help=f"of {', '.join(METHODS)}; all that suit the schedule by default")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="another option of the recipe")
    add(
        "--variant",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "KEY=VALUE"),
        help="also run nested with other options, as method NAME; can be repeated",
    )
    add("--output", type=Path, required=True, help="folder for results; what it has is not run again")
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _open_folder(
    options: argparse.Namespace,
    settings: Mapping[str, object],
    variants: Mapping[str, Mapping[str, object]],
) -> Path:
    """Make the output folder, or check that it has results of the same comparison and variants.

    Raises:
        NestifyError: if it has results of another one.
    """
    free = ("methods", "seeds", "variant", "output", "set")
    asked = {key: value for key, value in vars(options).items() if key not in free}
    asked["set"] = dict(settings)
    asked |= {f"variant {name}": dict(changes) for name, changes in variants.items()}
    asked = json.loads(json.dumps(asked, default=str))
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "settings.json"
    if record.exists() and any(folder.glob("*.npz")):
        found = json.loads(record.read_text())
        asked = {key: value for key, value in found.items() if key.startswith("variant ")} | asked
        keys = [
            key
            for key in {**asked, **found}
            if asked.get(key) != found.get(key) and (key in found or not key.startswith("variant "))
        ]
        if keys:
            texts = [f"--{key.replace('_', '-')} was {found.get(key)}, now {asked.get(key)}" for key in keys]
            raise nestify.NestifyError(
                f"{folder} has results of another comparison ({'; '.join(texts)}); give another --output"
            )
    record.write_text(json.dumps(asked, indent=1))
    return folder


def _run_all(
    options: argparse.Namespace,
    settings: Mapping[str, object],
    variants: Mapping[str, Mapping[str, object]],
    folder: Path,
) -> tuple[dict[str, dict[int, MethodRun]], list[str], bool]:
    """Run all methods with all seeds; return the runs, the names of the levels, and whether any failed."""
    usual = [*NESTIFY_METHODS, *RIVALS[options.schedule]]
    methods = options.methods.split(",") if options.methods else usual
    if unknown := sorted(set(methods) - set(usual)):
        raise nestify.NestifyError(
            f"--methods {', '.join(unknown)}: with --schedule {options.schedule}, give some of "
            f"{', '.join(usual)}"
        )
    for name in variants:
        if name in METHODS or not re.fullmatch(r"[\w.]+", name):
            raise nestify.NestifyError(
                f"--variant {name} is a method, or not a word; give a name of letters, digits, _ and ."
            )
    runs: dict[str, dict[int, MethodRun]] = {}
    names: list[str] = []
    failed = False
    for seed in options.seeds:
        contest = Contest(
            options.model, _overrides(options, settings, seed), folder / f"seed{seed}.nested.safetensors"
        )
        _check_plain(contest)
        print(f"seed {seed}: {len(contest.inputs.train_images)} training images", file=sys.stderr)
        names = [_level_name(contest, k) for k in range(1, len(contest.recipe.level) + 1)]
        for method, part, job in _jobs(contest, methods, variants):
            path = folder / f"seed{seed}-{part}.npz"
            if not path.exists():
                start = time.monotonic()
                print(f"seed {seed}: {part} ...", file=sys.stderr, end=" ", flush=True)
                try:
                    job().save(path)
                except Exception as error:  # of any library; the other methods are still worth running
                    failed = True
                    print(f"failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    continue
                print(f"{time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
            run = MethodRun.read(path)
            earlier = runs.setdefault(method, {}).get(seed)
            runs[method][seed] = run if earlier is None else _joined(earlier, run)
    return runs, names, failed


def _overrides(options: argparse.Namespace, settings: Mapping[str, object], seed: int) -> dict[str, object]:
    levels = options.levels or ",".join(map(str, DEFAULT_LEVELS[options.schedule]))
    given = {
        "model.checkpoint": options.checkpoint,
        "model.input_size": options.input_size,
        "data.path": options.data,
        "data.train_split": options.train_split,
        "data.val_split": options.val_split,
        "data.max_train": options.max_train,
        "train.epochs": options.epochs,
        "train.lr": options.lr,
        "train.opt": options.opt,
        "train.batch_size": options.batch_size,
        "schedule.kind": options.schedule,
        "levels": levels,
        "seed": seed,
    }
    return {key: value for key, value in given.items() if value is not None} | dict(settings)


def _check_plain(contest: Contest) -> None:
    """Refuse options that the rivals' training does not have."""
    recipe = contest.recipe
    sections = {"train": recipe.train, "augment": recipe.augment}
    used = [
        f"{section}.{name}"
        for section, values in sections.items()
        for name in UNSUPPORTED
        if (value := getattr(values, name, None)) and value != type(values).model_fields[name].default
    ]
    if recipe.train.teacher in ("self", "both"):
        used.append("train.teacher")
    if used:
        raise nestify.NestifyError(f"the rivals cannot train with {', '.join(used)}; leave it out")


def _level_name(contest: Contest, k: int) -> str:
    level = contest.recipe.level[k - 1]
    quantity = QUANTITY[contest.recipe.schedule.kind]
    return f"{k}: {quantity} {getattr(level, quantity):g}"


def _jobs(
    contest: Contest, methods: Sequence[str], variants: Mapping[str, Mapping[str, object]]
) -> Iterator[tuple[str, str, Job]]:
    """Yield what is to be run: the method, the name of its file, and a function that runs it."""
    numbers = range(1, len(contest.recipe.level) + 1)
    full = numbers[-1]
    if "nested" in methods:
        yield "nested", "nested", partial(contest.run_nestify, "nested", {})
    for name, changes in variants.items():
        yield name, name, partial(contest.run_nestify, name, changes)
    for k in numbers if "alone" in methods else ():
        weights = {f"level[{j}].weight": float(j == k) for j in numbers}
        part = f"alone-level{k}"
        yield "alone", part, partial(contest.run_nestify, part, weights, [k])
    for name, make in RIVALS[contest.recipe.schedule.kind].items():
        for k in numbers[:-1] if name in methods else ():
            yield name, f"{name}-level{k}", partial(contest.run_rival, k, make)
    if "dense" in methods:
        yield "dense", f"dense-level{full}", partial(contest.run_rival, full, leave_dense)


def _joined(first: MethodRun, second: MethodRun) -> MethodRun:
    """Return one run with the levels of two."""
    costs = {key: {**first.facts[key], **second.facts[key]} for key in ("nonzero", "macs")}
    same = first.facts["same"]
    if second.facts["same"] != same:  # shown in the first table, so that nobody misses it
        same = {key: _both(value, second.facts["same"].get(key)) for key, value in same.items()}
    return MethodRun(first.labels, {**first.predictions, **second.predictions}, {"same": same, **costs})


def _both(first: Any, second: Any) -> Any:
    return first if first == second else f"{first} / {second}"


def _print_equality(runs: Runs) -> None:
    """Print what must be equal for all methods, by seed, and whether it is."""
    for seed in dict.fromkeys(seed for by_seed in runs.values() for seed in by_seed):
        facts = {name: by_seed[seed].facts["same"] for name, by_seed in runs.items() if seed in by_seed}
        rows = []
        for key in next(iter(facts.values())):
            values = [str(fact[key]) for fact in facts.values()]
            rows.append([key, *values, "yes" if len(set(values)) == 1 else "NO"])
        print_table([f"seed {seed}", *facts, "equal"], rows)


def _write_predictions(folder: Path, runs: Runs) -> None:
    arrays = {
        f"seed{seed}/{method}/level{level}": classes.astype(np.int32)
        for method, by_seed in runs.items()
        for seed, run in by_seed.items()
        for level, classes in run.predictions.items()
    }
    labels = {f"seed{seed}/labels": run.labels for by_seed in runs.values() for seed, run in by_seed.items()}
    np.savez_compressed(folder / "predictions.npz", **labels, **arrays)


if __name__ == "__main__":
    sys.exit(main())
