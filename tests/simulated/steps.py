"""Training steps of small nested models on any device."""

from collections.abc import Sequence
from copy import deepcopy
from functools import cache

import timm
import torch
from timm.utils.random import random_seed
from torch import Tensor, nn

from nestify.model.graph.block_map import BlockMap, map_blocks
from nestify.model.graph.channel_map import ChannelMap, map_channels
from nestify.model.level_sizes import LevelSizes
from nestify.model.nested_model import NestedModel
from nestify.model.spec import describe_model
from nestify.recipe.augment_options import AugmentOptions
from nestify.recipe.levels import Level
from nestify.recipe.metric import AGREEMENT, TOP1
from nestify.recipe.options import TrainOptions
from nestify.schedule.channels import channel_counts
from nestify.schedule.ramp import Ramp
from nestify.training.checkpoint import pack
from nestify.training.distributed import SINGLE, World
from nestify.training.losses import label_loss
from nestify.training.precision import Precision
from nestify.training.stepper import Stepper
from nestify.training.task import NestedTask, Teacher

SIDE = 32
SCHEDULES = ("weight", "channel", "layer", "combined")
Batch = tuple[Tensor, Tensor]


@cache
def _maps(architecture: str) -> tuple[ChannelMap, BlockMap]:
    """Return the channels and blocks of a model, which do not depend on its weights."""
    channels = map_channels(_network(architecture), (3, SIDE, SIDE))
    return channels, map_blocks(channels)


def _network(architecture: str) -> nn.Module:
    # With a zero as the last scale of its block, most convolutions would have no gradient.
    more = {"img_size": SIDE} if architecture == "test_vit" else {"zero_init_last": False}
    network: nn.Module = timm.create_model(architecture, num_classes=10, drop_rate=0.0, **more)
    return network


@cache
def _model(schedule: str, architecture: str) -> tuple[NestedModel, list[Level]]:
    """Return an untrained nested model of three levels, and the levels."""
    torch.manual_seed(0)
    network = _network(architecture)
    spec = describe_model(network, (3, SIDE, SIDE))
    masks = schedule in ("weight", "combined")
    cuts = schedule in ("channel", "combined")
    levels = [
        Level(name, sparsity if masks else 0.0, width=width if cuts else 1.0)
        for name, sparsity, width in (("a", 0.9, 0.5), ("b", 0.5, 1.0), ("c", 0.0, 1.0))
    ]
    sizes = None
    if schedule != "weight":
        channels, blocks = _maps(architecture)
        skipped = frozenset({blocks.blocks[0].name} if schedule == "layer" else ())
        counts = channel_counts(channels.groups, levels, 8)
        sizes = LevelSizes(channels, blocks, tuple(counts), (skipped, frozenset(), frozenset()))
    names = [level.name for level in levels]
    masked = None if masks else ()
    return NestedModel(network, spec, names, masked=masked, level_sizes=sizes), levels


def make_stepper(
    schedule: str,
    device: torch.device | str,
    *,
    architecture: str = "test_resnet",
    teacher: str = "none",
    augment: AugmentOptions | None = None,
    compiled: bool = False,
    total: int = 8,
    drop_rate: float = 0.0,
    world: World = SINGLE,
    labelled: bool = True,
    class_counts: Sequence[int] | None = None,
    **options: object,
) -> Stepper:
    """Return a training on a device, whose weights are chosen before step 0 and step 1."""
    nested, levels = deepcopy(_model(schedule, architecture))
    random_seed(0)  # for mixup, which draws from NumPy's generator
    for module in nested.network.modules():
        if isinstance(module, nn.Dropout):
            module.p = drop_rate
    if hasattr(nested.network, "drop_rate"):
        nested.network.drop_rate = drop_rate
    device = torch.device(device)
    chosen = TrainOptions.model_validate({"lr": 0.05, **options})
    frozen = deepcopy(nested.network) if teacher in ("original", "both") else None
    normalization = {"mean": (0.5, 0.5, 0.5), "std": (0.3, 0.3, 0.3)}
    augment = augment or AugmentOptions()
    task = NestedTask(
        nested.to(device),
        label_loss(chosen, augment, class_counts).to(device),
        weights=[1.0, 2.0, 3.0],
        distill=[(0.5 if labelled else 1.0) if teacher != "none" else 0.0] * 3,
        teacher=Teacher(teacher, frozen, **normalization).to(device),  # type: ignore[arg-type]
        autocast=Precision(device, chosen.amp, chosen.amp_dtype).autocast,
        device=device,
        compiled=compiled,
        recompute=chosen.grad_checkpointing,
        sandwich=chosen.sandwich,
        metric=TOP1 if labelled else AGREEMENT,
    )
    ramp = Ramp(levels, 1, 1) if nested.entry_levels.total else None
    return Stepper(task, chosen, augment, epoch_steps=4, total=total, ramp=ramp, score="lamp", world=world)


def make_batch(device: torch.device | str, number: int = 0, size: int = 8) -> Batch:
    """Return images and labels that a loader would have copied to the device."""
    draw = torch.Generator().manual_seed(number)
    images = torch.randn(size, 3, SIDE, SIDE, generator=draw)
    return images.to(device), torch.randint(10, (size,), generator=draw).to(device)


def run_steps(training: Stepper, steps: int, accumulate: int = 1) -> dict[str, Tensor]:
    """Perform steps, and return all tensors of the training on the CPU."""
    device = training.task.device
    for _ in range(steps):
        first = training.position.step * accumulate
        training.step([make_batch(device, first + k) for k in range(accumulate)])
    return all_tensors(training)


def all_tensors(training: Stepper) -> dict[str, Tensor]:
    """Return the tensors of a training's state by name, on the CPU."""
    tensors: dict[str, Tensor] = {}
    state = {key: value for key, value in training.state().items() if key != "random"}
    pack(state, tensors, "state")
    return tensors
