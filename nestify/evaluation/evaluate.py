"""From a nested file and images to accuracy: of each level, of levels together, and of a cascade."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

from torch import Tensor

from nestify.data.dataset import open_images
from nestify.data.hierarchy import stored_class_levels
from nestify.data.loaders import Loader, eval_loader
from nestify.errors import RecipeError
from nestify.evaluation.accuracy import Accuracy
from nestify.evaluation.accuracy import evaluate as evaluate_networks
from nestify.evaluation.cascade import SWEEP, Cascade, climb
from nestify.evaluation.consensus import Answers, Consensus, Recorder, consensus
from nestify.file.loading import load_level
from nestify.file.manifest import LevelEntry
from nestify.file.reader import NestedFile, open_nested_file
from nestify.machine import pick_device, pick_workers, workers_warning
from nestify.recipe.amounts import Budget, parse_budget
from nestify.recipe.options import ConsensusKind, OnBadImage


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of levels of a file on images.

    Attributes:
        names: of the levels, in the order of `levels`. `classes`: how many each tells, and their name in the
            hierarchy, empty for the model's own.
        skipped: why images could not be read, by file name.
        consensus: of levels 1 to 2, 1 to 3, ... together; empty where it was not asked for.
        cascade: one entry per threshold; empty likewise. `calibrated`: whether the file holds the
            temperatures that make its thresholds probabilities.
        full_macs: dense and effective MACs of the highest of these levels, per image.
        warnings: sentences about what may be wrong.
    """

    path: str
    data: str
    names: Sequence[str]
    classes: Sequence[tuple[int, str]]
    levels: Sequence[Accuracy]
    skipped: Mapping[str, str]
    consensus: Sequence[Consensus] = ()
    cascade: Sequence[Cascade] = ()
    calibrated: bool = False
    full_macs: tuple[int | None, int | None] = (None, None)
    warnings: Sequence[str] = ()


def evaluate(
    path: str | os.PathLike[str],
    data: str,
    *,
    level: int | str = "all",
    consensus: ConsensusKind | None = None,
    cascade: float | str | None = None,
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
        consensus: evaluate also what the levels answer together: the `mean` of their probabilities, or by
            the `learned` weights of the file.
        cascade: evaluate also, image by image, the first level that is sure enough: a threshold such as 0.8,
            `macs=0.5` (the highest threshold that needs half of the full level's effective MACs on the
            mean), or `sweep`. With `level`, both are of the levels up to that one, and so are `levels`.
        split: `validation`, or what the data calls it.
        max_images: use at most so many, the classes as even as possible.
        seed: of the choice of `max_images`.

    Raises:
        NestifyError: if the file or the images are not right, or there is no such level or option.
    """
    file = open_nested_file(path, truncated=True)
    numbers = range(1, file.n_levels + 1) if level == "all" else [file.level_index(str(level))]
    together = Together(file.manifest.levels[: max(numbers)], consensus, cascade)
    if together.wanted:
        numbers = range(1, max(numbers) + 1)
    file.check_whole(max(numbers))
    where = pick_device(device)
    workers = pick_workers(workers, where)
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
        workers=workers,
        device=where,
    )
    recorder = Recorder() if together.wanted else None
    parents = stored_class_levels(file.manifest).parents
    results = [_accuracy(file, number, loader, recorder, parents) for number in numbers]
    entries = [file.manifest.levels[number - 1] for number in numbers]
    found: tuple[Sequence[Consensus], Sequence[Cascade]] = ((), ())
    if recorder is not None:
        found = together.of(recorder.answers(parents, model.num_classes))
    return Evaluation(
        path=file.name,
        data=data,
        names=[entry.name for entry in entries],
        classes=[
            (file.manifest.num_classes(k), entry.classes) for k, entry in zip(numbers, entries, strict=True)
        ],
        levels=results,
        skipped=dict(images.skipped),
        consensus=found[0],
        cascade=found[1],
        calibrated=together.calibrated,
        full_macs=together.macs[-1],
        warnings=[problem] if (problem := workers_warning(workers)) else [],
    )


def _accuracy(
    file: NestedFile, level: int, loader: Loader, recorder: Recorder | None, parents: Mapping[int, Tensor]
) -> Accuracy:
    """Of one level, which is in memory alone and timed by itself."""
    network = load_level(file, level).to(loader.device)
    if recorder is None:
        return evaluate_networks({level: network}, loader, parents=parents)[0]
    networks = {level: recorder.listening(level, network)}
    return evaluate_networks(networks, recorder.watching(loader), parents=parents)[0]


@dataclass(frozen=True)
class Together:
    """What is asked of levels 1 to n together.

    Args:
        levels: of the file, core first.
        kind: of consensus; None: none is asked for.
        asked: of the cascade, as users write it; None likewise.

    Raises:
        RecipeError: on construction, if it is not understood, or the file has no learned consensus.
    """

    levels: Sequence[LevelEntry]
    kind: ConsensusKind | None
    asked: float | str | None
    _cascade: float | Budget | None = field(init=False)

    def __post_init__(self) -> None:
        kinds = get_args(ConsensusKind)
        if self.kind not in (None, *kinds):
            raise RecipeError(f"--consensus {self.kind} is not {' or '.join(kinds)}")
        if self.kind == "learned" and not self.levels[-1].consensus:
            raise RecipeError(
                "--consensus learned: the file has no weights for it; write it with compress --consensus, or "
                "give mean"
            )
        if self.wanted and len(self.levels) < 2:
            raise RecipeError(
                "--consensus and --cascade need two levels or more; give a higher --level, or all"
            )
        object.__setattr__(self, "_cascade", None if self.asked in (None, "sweep") else _limit(self.asked))

    @property
    def wanted(self) -> bool:
        """Whether anything is asked for."""
        return self.kind is not None or self.asked is not None

    @property
    def calibrated(self) -> bool:
        """Whether the file holds a temperature for each level."""
        return all(level.temperature is not None for level in self.levels)

    @property
    def macs(self) -> list[tuple[int | None, int | None]]:
        """Per image, dense and effective, of every level."""
        return [(level.metrics.dense_macs, level.metrics.effective_macs) for level in self.levels]

    def of(self, answers: Answers) -> tuple[list[Consensus], list[Cascade]]:
        """What was asked for, of the answers of these levels."""
        agreed = [
            consensus(answers, k, self.levels[k - 1].consensus if self.kind == "learned" else (), self.macs)
            for k in range(2, len(self.levels) + 1)
            if self.kind is not None
        ]
        if self.asked is None:
            return agreed, []
        going = climb(answers, [level.temperature or 1.0 for level in self.levels], self.macs)
        if self._cascade is None:
            return agreed, [going.at(threshold) for threshold in SWEEP]
        if isinstance(self._cascade, Budget):
            return agreed, [going.within(self._cascade.target(self.macs[-1][1] or 0))]
        return agreed, [going.at(self._cascade)]


def _limit(asked: float | str | None) -> float | Budget:
    """A threshold, or a budget of MACs."""
    try:
        if isinstance(asked, str) and "=" in asked:
            budget = parse_budget(asked)
            if budget.quantity == "macs":
                return budget
        elif 0 <= (threshold := float(asked or 0)) <= 1:
            return threshold
    except ValueError:
        pass
    raise RecipeError(f"--cascade {asked} is none of a threshold in [0, 1] (0.8), macs=0.5, or sweep")
