"""The runs of a comparison: nestify, and a network that is pruned by a rival and fine-tuned alike.

The rivals are trained by the plain loop in this file. It takes from nestify the loader, with its order and
augmentation, and the teacher; optimizer and schedule are timm's, as nestify makes them.
"""

import sys
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

import nestify
from nestify.compression.inputs import Inputs, augmentation, open_inputs
from nestify.compression.models import frozen_teacher
from nestify.data.loaders import Loader, eval_loader, train_loader
from nestify.machine import pick_workers
from nestify.recipe.recipe import Recipe, load_recipe
from nestify.schedule.costs import Plan, count_macs, effective_macs
from nestify.training.loop import steps_per_epoch, total_steps
from nestify.training.task import Teacher
from tests.benchmarks.paired import Classes, MethodRun

FILE_VALIDATION_IMAGES = 500
"""Images that nestify itself validates on; the predictions are for all of them."""

Numbers = Mapping[str, int]
Make = Callable[["Contest", nn.Module, int], Callable[[int, int], None]]
"""Makes a network as small as a level; returns a function that is called before each step with the number of
the step and the number of all steps."""


@dataclass
class Seen:
    """What a training read.

    Attributes:
        images: number of images, repeats included.
        batches: number of batches.
        checksum: CRC-32 of all pixels and classes, in order, after augmentation.
    """

    images: int = 0
    batches: int = 0
    checksum: int = 0


@contextmanager
def recorded_training() -> Iterator[Seen]:
    """Record the batches that nestify's training loader delivers in this block."""
    seen, plain = Seen(), Loader.epoch

    def epoch(
        self: Loader, number: int, first_batch: int = 0
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        trains = self._loader.drop_last  # as only the training loader does
        with closing(plain(self, number, first_batch)) as batches:
            for images, target in batches:
                if trains:
                    seen.images += len(target)
                    seen.batches += 1
                    for tensor in (images, target):
                        seen.checksum = zlib.crc32(tensor.cpu().numpy().tobytes(), seen.checksum)
                yield images, target

    with patch.object(Loader, "epoch", epoch):
        yield seen


class Notices(nestify.Observer):
    """Prints each warning of nestify once, on standard error."""

    printed: ClassVar[set[str]] = set()

    def warned(self, text: str) -> None:
        """Print a warning."""
        if text not in self.printed:
            self.printed.add(text)
            print(f"warning: {text}", file=sys.stderr, flush=True)


class Contest:
    """One seed of a comparison: the recipe, and everything that all methods share.

    Args:
        source: recipe or timm model, as `nestify.load_recipe` takes it.
        overrides: options that replace the recipe's.
        output: the nested file of the recipe's own method; others get names like it.
    """

    def __init__(self, source: str, overrides: Mapping[str, object], output: Path) -> None:
        self._source, self._output = source, output
        self._overrides = {
            "train.eval_before": False,
            "train.eval_every": 1_000_000,
            # What a GPU may use by default, and the rivals do not have.
            **dict.fromkeys(
                ("train.amp", "train.tf32", "train.cudnn_benchmark", "train.channels_last"), False
            ),
            "train.compile": False,
            "train.checkpoint_minutes": 0.0,  # a run that was killed starts again, so that it is recorded
            **overrides,
        }
        self.recipe = self._recipe({})
        self._notices = Notices()

    def _recipe(self, more: Mapping[str, object]) -> Recipe:
        return load_recipe(self._source, {**self._overrides, **more})

    @cached_property
    def inputs(self) -> Inputs:
        """Images and model; opened once, and not changed."""
        random_seed(self.recipe.seed)
        inputs = open_inputs(self.recipe, self._notices, 1)
        if inputs.recipe.finetune.epochs:
            raise nestify.NestifyError(
                "the checkpoint does not predict the classes of the data; fine-tune it first (nestify "
                "compress ... --epochs 0 --set finetune.save=FILE.safetensors), give that as --checkpoint, "
                "and leave out finetune.epochs"
            )
        return inputs

    @cached_property
    def plan(self) -> Plan:
        """The costs of nestify's levels."""
        return nestify.plan(self.recipe, observer=self._notices)

    @cached_property
    def device(self) -> torch.device:
        """The device that trains."""
        if self.recipe.device != "auto":
            return torch.device(self.recipe.device)
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

    @property
    def workers(self) -> int:
        """Number of processes that load images."""
        return pick_workers(self.recipe.data.workers, self.device)

    def predict(self, networks: Mapping[int, nn.Module]) -> tuple[Classes, dict[int, Classes]]:
        """Return the classes of all validation images, (images,), and those that each network predicts."""
        loader = eval_loader(
            self.inputs.val_images,
            self.inputs.pretrained.spec.preprocessing,
            batch_size=self.recipe.train.batch_size,
            workers=self.workers,
            device=self.device,
        )
        labels: list[Tensor] = []
        found: dict[int, list[Tensor]] = {level: [] for level in networks}
        for network in networks.values():
            network.to(self.device).eval()
        with torch.inference_mode():
            for images, target in loader:
                labels.append(target.cpu())
                for level, network in networks.items():
                    found[level].append(network(images).argmax(1).cpu())
        predictions = {level: _whole(parts) for level, parts in found.items()}
        return _whole(labels), predictions

    def run_nestify(
        self, name: str, options: Mapping[str, object], levels: Sequence[int] | None = None
    ) -> MethodRun:
        """Run nestify.

        Args:
            name: name of the method, for the nested file.
            options: options that replace the recipe's.
            levels: levels to predict with; None for all.
        """
        path = self._output.with_name(f"{self._output.stem}-{name}.nested.safetensors")
        many = len(self.inputs.val_images) > FILE_VALIDATION_IMAGES
        limit = {"data.max_val": FILE_VALIDATION_IMAGES} if many else {}
        recipe = self._recipe({**limit, **options, "output": str(path)})
        with recorded_training() as seen:
            nestify.compress(recipe, observer=self._notices, resume=False)
        entries = nestify.read_report(path).levels
        numbers = list(levels or range(1, len(entries) + 1))
        labels, predictions = self.predict({k: nestify.load(path, level=k) for k in numbers})
        nonzero = {str(k): entries[k - 1].nonzero_parameters for k in numbers}
        macs = {str(k): entries[k - 1].effective_macs for k in numbers}
        return MethodRun(labels, predictions, self._facts(recipe, seen, nonzero, macs))

    def run_rival(self, level: int, make: Make) -> MethodRun:
        """Make a smaller network, fine-tune it, and predict with it.

        Args:
            level: the level that it is compared with, counted from 1.
            make: makes the network smaller.
        """
        random_seed(self.recipe.seed)
        network = deepcopy(self.inputs.pretrained.model).to(self.device)
        teacher = frozen_teacher(self.recipe, self.inputs.teacher, network)
        if self.recipe.train.channels_last:
            network = network.to(memory_format=torch.channels_last)
        before_step = make(self, network, level)
        with recorded_training() as seen:
            self._finetune(network, teacher, level, before_step)
        labels, predictions = self.predict({level: network})
        nonzero, macs = _costs(network.cpu(), self.inputs.pretrained.spec.input_size)
        facts = self._facts(self.recipe, seen, {str(level): nonzero}, {str(level): macs})
        return MethodRun(labels, predictions, facts)

    def _facts(self, recipe: Recipe, seen: Seen, nonzero: Numbers, macs: Numbers) -> dict[str, Any]:
        train = recipe.train
        same = {
            "lr": train.lr,
            "opt": train.opt,
            "schedule": train.sched,
            "weight decay": train.weight_decay,
            "batch size": train.batch_size,
            "teacher": train.teacher,
            "distill": train.distill,
            "epochs": train.epochs,
            "training images": len(self.inputs.train_images),
            "test images": len(self.inputs.val_images),
            **asdict(seen),
        }
        return {"same": same, "nonzero": nonzero, "macs": macs}

    def _finetune(
        self,
        network: nn.Module,
        frozen: nn.Module | None,
        level: int,
        before_step: Callable[[int, int], None],
    ) -> None:
        """Train a network with the loss of one level: a plain loop, with timm's optimizer and schedule."""
        options, spec = self.recipe.train, self.inputs.pretrained.spec
        batches = train_loader(
            self.inputs.train_images,
            spec.preprocessing,
            batch_size=self.inputs.batch_size,
            min_images=self.inputs.min_images,
            workers=self.workers,
            augment=augmentation(self.recipe),
            seed=self.recipe.seed,
            device=self.device,
        )
        kind: Any = {"none": "none", "original": "original"}.get(options.teacher, "other")
        mean, std = (tuple(spec.preprocessing[key]) for key in ("mean", "std"))
        teacher = Teacher(kind, frozen, mean=mean, std=std, temperature=options.temperature).to(self.device)
        own = self.recipe.level[level - 1].distill
        share = 0.0 if frozen is None else options.distill if own is None else own
        per_epoch = steps_per_epoch(batches, 1)
        total = total_steps(options.epochs, per_epoch)
        before_step(0, total)
        optimizer = create_optimizer_v2(
            network,
            opt=options.opt,
            lr=options.lr,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
            fallback_no_weight_decay=True,
        )
        schedule, _ = create_scheduler_v2(
            optimizer,
            sched=options.sched,
            num_epochs=max(1, total),
            warmup_epochs=ceil(options.warmup_epochs * per_epoch),
            warmup_lr=options.lr / 100,
            min_lr=options.min_lr,
            step_on_epochs=False,
            updates_per_epoch=1,
        )
        network.train()
        smoothing = self.recipe.augment.smoothing
        step = 0
        while step < total:
            with closing(batches.epoch(step // per_epoch)) as epoch_batches:
                for images, target in epoch_batches:
                    if step:
                        before_step(step, total)
                    logits = network(images)
                    loss = (1 - share) * functional.cross_entropy(logits, target, label_smoothing=smoothing)
                    soft = teacher.predict(images)
                    if share and soft is not None:
                        loss = loss + share * teacher.loss(logits, soft)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    step += 1
                    if schedule is not None:
                        schedule.step_update(step)
                    if step == total:
                        break


def _whole(parts: Sequence[Tensor]) -> Classes:
    found: Classes = torch.cat(list(parts)).numpy().astype(np.int64)
    return found


def _costs(network: nn.Module, input_size: tuple[int, int, int]) -> tuple[int, int]:
    """Return the number of non-zero parameters, and the MACs of a kernel that skips zeros.

    Masks of torch's pruning are multiplied into the weights first.
    """
    for module in network.modules():
        for name in [name for name, _ in module.named_parameters(recurse=False) if name.endswith("_orig")]:
            prune.remove(module, name.removesuffix("_orig"))
    kept = {name: int(tensor.count_nonzero()) for name, tensor in network.named_parameters()}
    sizes = {name: tensor.numel() for name, tensor in network.named_parameters() if tensor.ndim > 1}
    densities = {name: kept[name] / size for name, size in sizes.items()}
    return sum(kept.values()), effective_macs(count_macs(network, input_size), densities)
