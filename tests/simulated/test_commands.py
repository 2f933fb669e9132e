"""Commands on the simulated device."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.task.evaluator import ClassificationEvaluator
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import nestify as package
from nestify import accelerator
from nestify.compression.compress import compress
from nestify.file.reader import open_nested_file
from tests.cli.driver import DIGITS, TWO_STEPS, nestify
from tests.simulated import NAME
from tests.simulated.test_steps import different

OFF = ("amp", "channels_last", "tf32", "cudnn_benchmark")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tensors(path: str) -> dict[str, torch.Tensor]:
    """Return all tensors of a nested file."""
    state = open_nested_file(path).state()
    found = state.shared | {f"entry {name}": entry for name, entry in state.entry.tensors.items()}
    for level, private in enumerate(state.private, start=1):
        found |= {f"level {level} {name}": tensor for name, tensor in private.items()}
    return found


def test_a_run_without_the_fast_options_gives_the_file_of_the_cpu(gpu: torch.device) -> None:
    options: Mapping[str, object] = {
        "schedule.kind": "channel",
        "levels": "0.5,1",
        "train.bn": "recalibrate",
        "train.batch_size": 16,
        "train.epochs": 1,
        "train.eval_before": False,  # a step makes levels worse, which is a warning
        "train.recalibrate_batches": 1,
        "finetune.epochs": 1,
        "data.max_train": 48,
        "data.max_val": 20,
        "data.calibrate": 0.3,
        "data.workers": 0,
        **{f"train.{key}": False for key in OFF},
    }
    for device in ("cpu", NAME):
        compress("digits", {**options, "device": device, "output": device})
    assert different(tensors("cpu"), tensors(NAME)) == []
    levels = [[level.metrics for level in open_nested_file(path).manifest.levels] for path in ("cpu", NAME)]
    assert [metrics.top1 for metrics in levels[0]] == [metrics.top1 for metrics in levels[1]]


def test_commands_with_a_gpu(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    done = nestify("compress", "digits", *TWO_STEPS, "-o", "x")  # --device auto
    assert done.code == 0, done.err
    for key in OFF:
        assert f"train.{key}" in done.err
    assert "bfloat16" in done.err
    assert "Simulated GPU" in done.err
    recipe = open_nested_file("x").manifest.recipe
    assert {key: recipe["train"][key] for key in OFF} == dict.fromkeys(OFF, True)

    for words in (
        ("eval", "x", "--data", str(DIGITS)),
        ("bench", "x", "--rounds", "2", "--warmup", "0", "--batch-size", "1"),
        ("pick", "x", "--max-bytes", "100MB"),
        ("verify", "x"),
        ("export", "x", "--level", "1", "-o", "x.pt2"),
        ("slice", "x", "--level", "1", "-o", "y"),
        ("doctor",),
    ):
        done = nestify(*words)
        assert done.code == 0, (words, done.err)

    def fail(*_: object) -> None:
        raise AssertionError("the random states of GPUs are no concern of the CPU")

    monkeypatch.setattr(torch.simulated, "get_rng_state", fail)  # type: ignore[attr-defined]
    package.load("x")


class _Refuse64(TorchDispatchMode):
    """Fails where the simulated device would hold a 64-bit floating-point number, which Apple's cannot."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for each in _pytree.tree_leaves(results):
            if isinstance(each, torch.Tensor) and each.device.type == NAME:
                assert each.dtype != torch.float64, func
        return results


def test_a_device_without_float64(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "NO_FLOAT64", frozenset({NAME}))

    def reset(self: ClassificationEvaluator) -> None:
        """Reset as timm does on Apple's devices."""
        self.num_samples = 0
        self.loss_sum = torch.zeros((), device=self.device)
        self.counts = torch.zeros(3, dtype=torch.int64, device=self.device)

    monkeypatch.setattr(ClassificationEvaluator, "reset", reset)
    quick = (*TWO_STEPS, "--restart", "--set", "train.amp=false")
    with _Refuse64():
        for schedule in (
            ("--schedule", "weight", "--levels", "0.9,0", "--pattern", "1x4", "--set", "schedule.ramp=0.5"),
            ("--schedule", "channel", "--levels", "0.5,1"),
        ):
            done = nestify("compress", "digits", *quick, *schedule, "-o", "x")
            assert done.code == 0, done.err
        for words in (("--unlabelled",), ("--consensus", "mean", "--cascade", "0.8")):
            done = nestify("eval", "x", "--data", str(DIGITS), "--max-images", "20", *words)
            assert done.code == 0, done.err
