"""The training loop: steps, gradual sparsity, averaging, and losses that are not finite."""

from collections.abc import Callable, Generator
from copy import deepcopy

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from nestify.errors import DivergedError
from nestify.model.nested_model import NestedModel
from nestify.model.spec import describe_model
from nestify.recipe.augment_options import AugmentOptions
from nestify.recipe.levels import Level
from nestify.recipe.options import TrainOptions
from nestify.schedule.nest import choose_weights
from nestify.schedule.ramp import Ramp
from nestify.training.loop import train
from nestify.training.progress import StepLog
from nestify.training.task import NestedTask, Teacher

MakeModel = Callable[..., nn.Module]
LEVELS = [Level("a", 0.9), Level("b", 0.5), Level("c", 0.0)]


class Squares:
    """Batches of a task that a network can learn: whether the left half of an image is brighter."""

    def __init__(self, batches: int = 6, images: int = 16) -> None:
        self.batches, self.images = batches, images
        self.place = 0
        self.epochs: list[int] = []

    def __len__(self) -> int:
        return self.batches

    def epoch(self, number: int, first_batch: int = 0) -> Generator[tuple[Tensor, Tensor], None, None]:
        self.epochs.append(number)
        generator = torch.Generator().manual_seed(number)
        for place in range(self.batches):
            images = torch.randn(self.images, 3, 32, 32, generator=generator)
            target = torch.randint(2, (self.images,), generator=generator)
            images[target == 1, :, :, :16] += 1
            images[target == 0, :, :, 16:] += 1
            self.place = place + 1
            if place >= first_batch:
                yield images, target


def make_task(make_model: MakeModel) -> NestedTask:
    model = make_model("test_resnet", num_classes=2)
    nested = NestedModel(model, describe_model(model), ["a", "b", "c"])
    return NestedTask(
        nested, nn.CrossEntropyLoss(), weights=[1, 1, 1], distill=[0, 0, 0], teacher=Teacher("none")
    )


def options(**values: object) -> TrainOptions:
    return TrainOptions(**{"epochs": 4.0, "lr": 0.05, **values})  # type: ignore[arg-type]


def run(
    task: NestedTask, chosen: TrainOptions, ramp: Ramp | None = None, data: Squares | None = None
) -> tuple[NestedModel, list[StepLog]]:
    logs: list[StepLog] = []
    trained = train(task, data or Squares(), chosen, AugmentOptions(), ramp=ramp, on_log=logs.append)
    return trained, logs


def test_all_levels_learn_while_sparsity_rises_to_its_exact_target(make_model: MakeModel) -> None:
    trained, logs = run(make_task(make_model), options(epochs=8.0), Ramp(LEVELS, 24, 12))
    assert all(top1 > 90 for top1 in logs[-1].scores)
    assert logs[-1].losses[0] < logs[0].losses[0]
    sparsities = [log.sparsity[0] for log in logs]
    assert sparsities == sorted(sparsities)
    entry = trained.entry_levels
    assert [entry.count_kept(k) for k in (1, 2, 3)] == [round(entry.total * (1 - s)) for s in (0.9, 0.5, 0)]
    assert not trained.training


def test_entry_levels_are_frozen_after_the_ramp(make_model: MakeModel) -> None:
    task = make_task(make_model)
    seen: list[dict[str, Tensor]] = []
    nested = task.get_trainable_module()

    def record(log: StepLog) -> None:
        seen.append({name: entry.clone() for name, entry in nested.entry.items()})

    train(task, Squares(images=4), options(), AugmentOptions(), ramp=Ramp(LEVELS, 12, 4), on_log=record)
    later = seen[3:]  # the logs after step 12
    assert len(later) >= 2
    for name, entry in later[0].items():
        assert torch.equal(entry, later[-1][name])


def test_a_ramp_as_long_as_the_training_still_reaches_its_target(make_model: MakeModel) -> None:
    trained, _ = run(make_task(make_model), options(epochs=1.0), Ramp(LEVELS, 6, 2))
    assert trained.entry_levels.count_kept(1) == round(trained.entry_levels.total * 0.1)


def test_a_ramp_reaches_its_target_though_batches_without_readable_images_make_no_steps(
    make_model: MakeModel,
) -> None:
    class Damaged(Squares):
        def epoch(self, number: int, first_batch: int = 0) -> Generator[tuple[Tensor, Tensor], None, None]:
            for images, target in super().epoch(number, first_batch):
                if self.place > 2:
                    yield images, target

    trained, logs = run(make_task(make_model), options(epochs=1.0), Ramp(LEVELS, 5, 2), Damaged())
    assert logs[-1].step == 4
    assert trained.entry_levels.count_kept(1) == round(trained.entry_levels.total * 0.1)


def test_a_ramp_as_long_as_the_training_gives_the_running_average_its_last_masks(
    make_model: MakeModel,
) -> None:
    trained, _ = run(make_task(make_model), options(epochs=1.0, ema_decay=0.9), Ramp(LEVELS, 6, 2))
    assert trained.entry_levels.count_kept(1) == round(trained.entry_levels.total * 0.1)


def test_steps_of_a_fraction_of_an_epoch(make_model: MakeModel) -> None:
    task = make_task(make_model)
    data = Squares()
    logs: list[StepLog] = []
    train(task, data, options(epochs=1.5), AugmentOptions(), on_log=logs.append)
    assert logs[-1].step == logs[-1].total_steps == 9
    assert data.epochs == [0, 1]
    assert [log.epoch for log in logs if log.epoch_ended] == [1, 2]


def test_cosine_ends_at_the_smallest_rate_and_warms_up(make_model: MakeModel) -> None:
    rates: list[float] = []
    task = make_task(make_model)
    train(
        task,
        Squares(4, images=2),
        options(epochs=10.0, lr=0.02, min_lr=0.001, warmup_epochs=2.0),
        AugmentOptions(),
        on_log=lambda log: rates.append(log.lr),
    )
    assert rates[0] < rates[1]
    assert max(rates) == pytest.approx(0.02, rel=0.1)
    assert rates[-1] == pytest.approx(0.001, rel=0.1)


@pytest.mark.parametrize("opt", ["adamw", "lion"])
def test_adaptive_optimizers_take_each_weights_step_at_its_pace(opt: str, make_model: MakeModel) -> None:
    """The first step of these optimizers is the learning rate times the sign of the gradient."""
    task = make_task(make_model)
    nested = task.get_trainable_module()
    choose_weights(nested, LEVELS, "lamp")
    before = {name: nested.shared_tensor(name).detach().clone() for name in nested.entry}
    run(task, options(epochs=1 / 6, opt=opt, lr=0.001, weight_decay=0.0))
    steps = {name: (nested.shared_tensor(name).detach() - before[name]).abs() / 0.001 for name in before}
    for level, length in enumerate((3**0.5, 8**0.5, 1), start=1):
        found = torch.cat([steps[name][nested.entry[name] == level] for name in before])
        found = found[found > 0]  # without a gradient, there is no step
        assert len(found) > 1000
        assert found.quantile(0.1).item() == pytest.approx(length, rel=0.01)
        assert found.quantile(0.9).item() == pytest.approx(length, rel=0.01)


def test_a_level_that_is_trained_alone_takes_the_steps_of_the_optimizer(make_model: MakeModel) -> None:
    """The expected weights come from a plain loop over the network."""
    task = make_task(make_model)
    nested = task.get_trainable_module()
    alone = NestedTask(
        nested, nn.CrossEntropyLoss(), weights=[0, 0, 1], distill=[0, 0, 0], teacher=Teacher("none")
    )
    plain = deepcopy(nested.network).train()
    chosen = options(epochs=1.0, opt="adamw", lr=0.001, weight_decay=0.1, sched="constant")
    optimizer = create_optimizer_v2(plain, opt="adamw", lr=0.001, weight_decay=0.1)
    for images, target in Squares().epoch(0):
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(images), target).backward()
        optimizer.step()
    run(alone, chosen)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(nested.network.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_the_running_average_is_returned(make_model: MakeModel) -> None:
    task = make_task(make_model)
    trained, _ = run(task, options(ema_decay=0.9), Ramp(LEVELS, 12, 4), Squares(images=4))
    last = task.get_trainable_module()
    assert isinstance(last, NestedModel)
    assert trained is not last
    assert trained.entry_levels.count_kept(1) == last.entry_levels.count_kept(1)
    for name in trained.entry:
        assert torch.equal(trained.entry[name], last.entry[name])
    assert not torch.equal(trained.shared_tensor("fc.weight"), last.shared_tensor("fc.weight"))


def test_mixup_trains_on_soft_targets(make_model: MakeModel) -> None:
    from timm.loss import SoftTargetCrossEntropy

    task = make_task(make_model)
    task.criterion = SoftTargetCrossEntropy()
    logs: list[StepLog] = []
    train(task, Squares(), options(), AugmentOptions(mixup=0.2, cutmix=0.5), on_log=logs.append)
    assert all(loss < 1 for loss in logs[-1].losses)


def test_diverged_loss_names_level_step_and_remedy(make_model: MakeModel) -> None:
    with pytest.raises(DivergedError, match=r"loss of level \d is (nan|inf) at step \d+ of 24; a smaller"):
        run(make_task(make_model), options(lr=1e12))


def test_same_seed_gives_the_same_weights(make_model: MakeModel) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        trained, _ = run(make_task(make_model), options(epochs=1.0), Ramp(LEVELS, 3, 2), Squares(images=4))
        states.append(trained.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
