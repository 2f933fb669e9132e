"""Estimate the time and memory of a training step from one small step on synthetic images."""

from copy import deepcopy

import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor
from torch.nn.functional import one_hot

from nestify.accelerator import clock_of
from nestify.model.nested_model import NestedModel
from nestify.model.spec import synthetic_input
from nestify.recipe.metric import MAP
from nestify.training.task import NestedTask
from nestify.training.usual_rate import is_adaptive

SAMPLE = 8  # images of the trial step; the cost of larger batches is assumed to be proportional


def estimate_step(task: NestedTask, batch_size: int, opt: str) -> tuple[float, int]:
    """Estimate the seconds and the peak bytes of one training step; the task is left unchanged.

    Args:
        task: the model and its loss.
        batch_size: images of the step.
        opt: timm's name of the optimizer.

    Returns:
        Seconds of the forward and backward passes of all levels at `batch_size`, and bytes of weights,
        gradients, one masked copy, two optimizer slots, the teacher, the activations that autograd stores for
        one level, with an adaptive optimizer the weights before its step, and on other devices than the CPU
        a level's own gradients.
    """
    trial = deepcopy(task)
    nested = trial.get_trainable_module()
    assert isinstance(nested, NestedModel)
    nested.train()
    batch = min(SAMPLE, batch_size)
    images = synthetic_input(nested.spec.input_size, batch).to(task.device)
    target = torch.zeros(batch, dtype=torch.long, device=task.device)
    if task.metric is MAP or isinstance(task.criterion, SoftTargetCrossEntropy):
        target = one_hot(target, nested.spec.num_classes).float()
    activations = _activation_bytes(nested, images)
    trial.backward(images, target)  # warms up
    clock = clock_of(task.device)
    start = clock()
    trial.backward(images, target)
    seconds = (clock() - start) * batch_size / batch
    weights = sum(tensor.numel() * tensor.element_size() for tensor in nested.network.parameters())
    teacher = sum(tensor.numel() * tensor.element_size() for tensor in trial.teacher.parameters())
    copies = 5 + is_adaptive(opt) + (task.device.type != "cpu")
    return seconds, round(activations * batch_size / batch) + copies * weights + teacher


def _activation_bytes(nested: NestedModel, images: Tensor) -> int:
    """Return the bytes of activations that autograd stores for the backward pass of one level."""
    seen: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    own = {tensor.untyped_storage().data_ptr() for tensor in nested.state_dict().values()}
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        logits = nested(images)
    del logits
    return sum(size for pointer, size in seen.items() if pointer not in own)
