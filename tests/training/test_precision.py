"""The floating-point type that a run uses, and training in it."""

from pathlib import Path

import pytest
import torch

from nestify.compression import compress as api
from nestify.errors import RecipeError
from nestify.file.loading import load
from nestify.training import precision
from nestify.training.precision import Precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "amp", "requested", "has_bfloat16", "dtype"),
    [
        (CPU, False, "bfloat16", True, torch.float32),
        (CPU, True, "auto", True, torch.bfloat16),
        (CPU, True, "auto", False, torch.float32),
        (CPU, True, "bfloat16", False, torch.bfloat16),
        (CUDA, True, "auto", True, torch.bfloat16),
        (CUDA, True, "auto", False, torch.float16),
        (CUDA, True, "float16", True, torch.float16),
        (torch.device("mps"), True, "auto", True, torch.float32),
    ],
)
def test_dtype(
    device: torch.device,
    amp: bool,
    requested: precision.AmpDtype,
    has_bfloat16: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def supported(including_emulation: bool) -> bool:
        return has_bfloat16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bfloat16}, raising=False)
    assert Precision(device, amp, requested).dtype == dtype


def test_float16_on_a_cpu_is_refused() -> None:
    with pytest.raises(RecipeError, match=r'train\.amp_dtype = "float16" .*use "bfloat16" or "auto"'):
        Precision(CPU, True, "float16")


@pytest.mark.long
@pytest.mark.parametrize("levels", [{"levels": "0.9,0"}, {"schedule.kind": "channel", "levels": "0.5,1"}])
def test_training_in_bfloat16(
    levels: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options: dict[str, object] = {
        "data.max_train": 64,
        "data.max_val": 50,
        "train.batch_size": 32,
        "train.epochs": 2,
        "train.eval_before": False,
        "train.amp": True,
        "train.amp_dtype": "bfloat16",
        **levels,
    }
    seen: set[torch.dtype] = set()
    conv = torch.nn.functional.conv2d

    def recording_conv(x: torch.Tensor, *given: object, **named: object) -> torch.Tensor:
        out = conv(x, *given, **named)  # type: ignore[arg-type]
        seen.add(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.functional, "conv2d", recording_conv)
    result = api.compress("digits", options)
    full = result.manifest.levels[-1].metrics
    assert full.top1 is not None
    assert full.top1 > 80
    assert all(value.dtype != torch.bfloat16 for value in result_tensors(result.path))
    if "schedule.kind" not in levels:
        assert torch.bfloat16 in seen


def result_tensors(path: Path) -> list[torch.Tensor]:
    return list(load(path).state_dict().values())
