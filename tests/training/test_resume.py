"""A run interrupted at any step resumes to the same bytes; a checkpoint of a different run is refused."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from nestify.compression import compress as api
from nestify.errors import CheckpointError, DataError, OutputError, RecipeError
from nestify.training import resume
from nestify.training.observer import Observer
from nestify.training.progress import StepLog
from nestify.training.stepper import Stepper

OUTPUT = Path("run.nested.safetensors")
CHECKPOINT = Path("run.resume.safetensors")
LOG = Path("run.metrics.jsonl")
SMALL: Mapping[str, object] = {  # 3 steps of fine-tuning, 8 of training: the last epoch is incomplete
    "output": str(OUTPUT),
    "data.max_train": 48,
    "data.max_val": 20,
    "train.batch_size": 16,
    "train.epochs": 2.6,
    "train.recalibrate_batches": 1,
    "finetune.epochs": 1,
    "levels": "0.9,0",
    "schedule.ramp": 0.5,
    "schedule.fit": False,
}


@dataclass(frozen=True)
class Variant:
    """Options of a run, and the number of steps of each of its parts before the part is interrupted."""

    options: Mapping[str, object]
    cuts: Sequence[int] = (1, 2, 1, 4)  # within an epoch of each phase, between the phases, in a later epoch


VARIANTS = {
    "ramp to the end": Variant({"schedule.ramp": 1.0, "train.opt": "lamb", "train.channels_last": True}),
    "budgets": Variant({"levels": "macs=0.4,1", "train.eval_before": False, "train.epochs": 1}, cuts=(5,)),
    "channels": Variant(
        {
            "schedule.kind": "channel",
            "levels": "0.5,1",
            "train.bn": "recalibrate",
            "train.eval_before": False,
        },
        cuts=(1, 2, 5),
    ),
    "averaged": Variant({"train.ema_decay": 0.9, "train.opt": "adamw", "train.clip_grad": 1.0}),
    "hierarchy, calibration": Variant(
        {
            "data.hierarchy": "kinds.csv",
            "data.calibrate": 0.3,
            "train.batch_size": 8,
            "levels": "0.9,0.5,0",
        },
        cuts=(3, 5),
    ),
    "random numbers, no fine-tuning": Variant(
        {
            "finetune.epochs": 0,
            "levels": "0.9,0.7,0.5,0",
            "train.sandwich": 2,
            "augment.mixup": 0.2,
            "model.kwargs.drop_rate": 0.3,
            "train.teacher": "both",
            "data.workers": 2,
        },
        cuts=(2, 3, 2),
    ),
}


class Interrupted(Exception):
    """Interrupts a run before a step."""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [f"{digit},{'even' if digit % 2 == 0 else 'odd'}" for digit in range(10)]
    Path("kinds.csv").write_text("\n".join(["digit,kind", *rows]))


def run(options: Mapping[str, object] = {}, **more: Any) -> bytes:
    """Finish a run, and return the bytes of its nested file."""
    api.compress("digits", {**SMALL, **options}, **more)
    assert not CHECKPOINT.exists()
    return OUTPUT.read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The nested file of a run without further options."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("uninterrupted"))
        return run()


def interrupt_after(steps: int, options: Mapping[str, object] = {}, **more: Any) -> None:
    """Start or resume a run, and interrupt it after `steps` steps."""
    original_step, done = Stepper.step, 0

    def counted_step(self: Stepper, *given: Any) -> None:
        nonlocal done
        if done == steps:
            raise Interrupted
        original_step(self, *given)
        done += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "step", counted_step)
        with pytest.raises(Interrupted):
            run(options, **more)


LONG = ("averaged", "budgets", "ramp to the end", "random numbers, no fine-tuning", "channels")


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(variant, id=name, marks=[pytest.mark.long] if name in LONG else [])
        for name, variant in VARIANTS.items()
    ],
)
def test_a_run_that_is_interrupted_several_times_ends_with_the_same_bytes(variant: Variant) -> None:
    uninterrupted = run(variant.options)
    log = untimed()
    for part, steps in enumerate(variant.cuts):
        interrupt_after(steps, variant.options, resume=True if part else None)
        assert CHECKPOINT.exists()
    assert run(variant.options, resume=True) == uninterrupted
    assert untimed() == log


def untimed() -> list[dict[str, Any]]:
    """Return the lines of the log without times, after checking that the times rise."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in LOG.read_text().splitlines()]
    seconds = [line.pop("seconds") for line in lines]
    assert seconds == sorted(seconds)
    for line in lines:
        for level in line.get("levels", []):
            del level["images_per_second"]
    return lines


class Recorder(Observer):
    """Records stages and warnings."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.warnings: list[str] = []
        self.images: list[int] = []

    def stepped(self, phase: str, log: StepLog) -> None:
        if phase == "train" and log.epoch_ended:
            self.images.append(log.images - log.images_before)

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def warned(self, text: str) -> None:
        self.warnings.append(text)


def test_a_resumed_run_reports_its_position_and_does_nothing_twice() -> None:
    interrupt_after(3 + 4)
    recorder = Recorder()
    run(observer=recorder)
    assert "resuming at step 4 of 8 of the training" in recorder.stages
    assert recorder.images[0] == 2 * 16  # steps 5 and 6, the time of which is known
    for done in ("fine-tuning the dense model", "evaluating the original model"):
        assert done not in recorder.stages
    assert "evaluating the levels before training" not in recorder.stages


def test_an_older_checkpoint_stays_if_a_new_one_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupt_after(2)
    older = CHECKPOINT.read_bytes()

    def fail(*_: object) -> None:
        raise OutputError("the disk is full")

    monkeypatch.setattr(resume, "write_checkpoint", fail)
    recorder = Recorder()
    interrupt_after(3, observer=recorder)
    assert CHECKPOINT.read_bytes() == older
    assert recorder.warnings
    assert set(recorder.warnings) == {
        "the checkpoint was not saved, and will be tried again: the disk is full"
    }


def test_zero_minutes_save_no_checkpoint() -> None:
    interrupt_after(4, {"train.checkpoint_minutes": 0})
    assert not CHECKPOINT.exists()


def test_an_error_between_steps_saves_the_last_step(uninterrupted: bytes) -> None:
    steps: list[int] = []

    class Broken(Observer):
        def stepped(self, phase: object, log: Any) -> None:
            steps.append(log.step)
            if log.step == 3 and len(steps) == 2:
                raise DataError("an image cannot be read")

    with pytest.raises(DataError) as error:
        run(observer=Broken())
    assert error.value.__notes__ == ["the same command resumes from step 3 of 8 of the training"]
    assert run() == uninterrupted


# Refused checkpoints


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"train.lr": 0.02}, "train.lr is 0.02 now and was 0.01 when the run began"),
        ({"seed": 1}, "seed is 1 now and was 42 when the run began"),
        ({"levels": "0.8,0"}, "level[1].sparsity is 0.8 now and was 0.9 when the run began"),
        ({"data.max_train": 47}, "data.max_train is 47 now and was 48 when the run began"),
    ],
)
def test_a_checkpoint_of_a_different_run_is_refused(changed: Mapping[str, object], difference: str) -> None:
    interrupt_after(1)
    saved = CHECKPOINT.read_bytes()
    with pytest.raises(RecipeError) as error:
        run(changed)
    message = str(error.value)
    assert message.startswith(f"{CHECKPOINT} belongs to a different run: {difference}; ")
    assert "--restart" in message
    assert CHECKPOINT.read_bytes() == saved


def test_other_versions_weights_and_images_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(1)
    others: dict[str, tuple[str, object]] = {
        "the version of timm is 0 now": ("timm.__version__", "0"),
        "hash of the model's weights": ("nestify.training.identity._hash_of_weights", lambda network: "0"),
        "names of the training images": ("nestify.data.dataset.Images.inner_names", lambda images: ["0"]),
    }
    for difference, (name, value) in others.items():
        with monkeypatch.context() as patch:
            patch.setattr(name, value)
            with pytest.raises(RecipeError, match=difference):
                run()


def test_options_that_do_not_change_the_result_may_differ() -> None:
    short = {"train.eval_before": False, "train.epochs": 2, "finetune.epochs": 0}
    interrupt_after(4, short)
    free = {**short, "data.workers": 1, "train.checkpoint_minutes": 5, "data.on_bad_image": "skip"}
    run({**free, "gates.min_top1": 1}, resume=True)


@pytest.mark.long  # the command's test of refusals ends with --restart too
def test_restart_starts_from_scratch(uninterrupted: bytes) -> None:
    interrupt_after(4)
    recorder = Recorder()
    assert run(resume=False, observer=recorder) == uninterrupted
    assert not any("resuming" in stage for stage in recorder.stages)


def test_resume_without_a_checkpoint_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"--resume: there is no checkpoint run\.resume\.safetensors; leave"
    ):
        run(resume=True)


def test_a_damaged_checkpoint_is_refused() -> None:
    interrupt_after(4)
    saved = CHECKPOINT.read_bytes()
    middle = len(saved) // 2
    with safe_open(CHECKPOINT, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    changed = {**tensors, "training.model.network.fc.bias": tensors["training.model.network.fc.bias"] + 1}
    damaged: dict[str, bytes] = {
        "empty": b"",
        "truncated": saved[:middle],
        "flipped": saved[:middle] + bytes([saved[middle] ^ 1]) + saved[middle + 1 :],
        "text": b"not a checkpoint" * 100,
    }
    for name, found in (
        ("no facts", (tensors, {})),
        ("other tensors", (changed, metadata)),
        ("another format", (tensors, {**metadata, "nestify_checkpoint": "2"})),
        ("other facts", (tensors, {**metadata, "facts": metadata["facts"].replace('"step":1', '"step":2')})),
    ):
        save_file(found[0], "forged", found[1])
        damaged[name] = Path("forged").read_bytes()
        assert damaged[name] != saved, name
    for name, found_bytes in damaged.items():
        CHECKPOINT.write_bytes(found_bytes)
        with pytest.raises(CheckpointError) as error:
            run()
        message = str(error.value)
        assert message.startswith(f"{CHECKPOINT}: the run cannot resume from this checkpoint ("), name
        assert "); use --restart" in message, name
        assert "\n" not in message, name
        assert CHECKPOINT.read_bytes() == found_bytes
    interrupt_after(1, resume=False)


def test_a_checkpoint_that_does_not_fit_its_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    state = Stepper.state

    def other(self: Stepper, *given: Any) -> dict[str, Any]:
        return {**state(self, *given), "model": {"fc.bias": self.nested.network.fc.bias}}

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "state", other)
        interrupt_after(4)
    with pytest.raises(CheckpointError, match="the run cannot resume from this checkpoint"):
        run()
