"""Checkpoints of many kinds are read as plain weights, or refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from nestify.errors import CheckpointError
from nestify.model.weights_file import read_weights


def small_state() -> dict[str, Tensor]:
    return {"conv.weight": torch.arange(6.0).reshape(2, 3), "conv.bias": torch.ones(2)}


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


MOMENTUM = {"state": {0: {"exp_avg": torch.ones(3)}, 1: {"exp_avg": torch.ones(3)}}, "param_groups": []}
BY_NAME = {"state": {"conv.weight": {"exp_avg": torch.ones(3)}}}


@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (lambda s: s, ""),
        (lambda s: {"state_dict": s, "optimizer": MOMENTUM}, ""),
        (lambda s: {"state_dict": {"conv.weight": torch.zeros(1)}, "state_dict_ema": s}, ""),
        (lambda s: {"model": "resnet50", "state_dict_ema": None, "net": s}, "net"),
        (lambda s: {"model_state_dict": s, "optimizer_state_dict": MOMENTUM, "epoch": 3}, "model_state_dict"),
        (lambda s: {"net": s, "epoch": torch.tensor(3), "mean": torch.ones(1)}, "net"),
        (lambda s: {"weights": s, "optimizer": BY_NAME}, "weights"),
        (lambda s: {"checkpoint": {"module": s}}, "checkpoint.module"),
        (lambda s: {**s, "conv._extra_state": {"amax": torch.ones(1)}}, ""),
        (lambda s: {"net": {f"module.{key}": tensor for key, tensor in s.items()}}, "net"),
    ],
)
def test_the_one_state_dict_is_found(wrap: Callable[[object], object], place: str, tmp_path: Path) -> None:
    state = small_state()
    read = read_weights(saved(wrap(state), tmp_path / "wrapped.pth"))
    assert read.tensors.keys() == state.keys()
    assert all(torch.equal(read.tensors[key], tensor) for key, tensor in state.items())
    assert [notice.rpartition(" ")[2] for notice in read.notices] == ([place] if place else [])


@pytest.mark.parametrize("names", [("generator", "discriminator"), ("student", "teacher")])
def test_several_state_dicts_are_refused_by_name(names: tuple[str, str], tmp_path: Path) -> None:
    path = saved(dict.fromkeys(names, small_state()) | {names[1]: small_state()}, tmp_path / "two.pth")
    with pytest.raises(CheckpointError, match=rf"two.pth contains several .*{names[0]}, {names[1]}"):
        read_weights(path)


@pytest.mark.parametrize("content", [torch.ones(3), [torch.ones(3)], {0: torch.ones(3)}, {"a": "b"}, None, 3])
def test_content_without_a_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no.pth contains no tensors; give the state dict"):
        read_weights(saved(content, tmp_path / "no.pth"))


@pytest.mark.filterwarnings("ignore")  # quantized tensors are deprecated, nested tensors a prototype
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse"),
        (lambda: torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8), "quantized"),
        (lambda: torch.empty(3, device="meta"), "meta device"),
        (lambda: torch.ones(3, dtype=torch.complex64), "complex"),
        (lambda: torch.ones(1).expand(100_000, 100_000), "repeats its values"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), ""),
        (lambda: torch.tensor([1.0, float("inf")]), "not finite"),
    ],
)
def test_tensors_of_other_kinds_are_refused(make: Callable[[], Tensor], kind: str, tmp_path: Path) -> None:
    path = saved(small_state() | {"fc.weight": make()}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=rf"odd.pth.*{kind}"):
        read_weights(path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_narrow_floats_keep_their_values(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = torch.tensor([0.5, -1.75, 0.0, 448.0 if dtype != torch.float8_e5m2 else 1.75])
    save_file({"fc.weight": weight.to(dtype)}, tmp_path / "narrow.safetensors")
    assert torch.equal(read_weights(tmp_path / "narrow.safetensors").tensors["fc.weight"].float(), weight)


def test_float8_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)}, tmp_path / "nan.safetensors")
    with pytest.raises(CheckpointError, match="w has values that are not finite"):
        read_weights(tmp_path / "nan.safetensors")


def test_pruning_masks_are_applied_exactly(tmp_path: Path) -> None:
    layer = nn.Conv2d(3, 4, 3)
    prune.l1_unstructured(layer, "weight", amount=0.7)
    prune.random_unstructured(layer, "bias", amount=0.5)
    read = read_weights(saved({"state_dict": layer.state_dict()}, tmp_path / "pruned.pth"))
    assert read.tensors.keys() == {"weight", "bias"}
    assert torch.equal(read.tensors["weight"], layer.weight)
    assert torch.equal(read.tensors["bias"], layer.bias)
    assert "2 pruning masks were applied (" in read.notices[0]
    assert "weight" in read.notices[0]


def test_masks_of_other_weights_are_left_alone(tmp_path: Path) -> None:
    state = {"a_orig": torch.ones(2), "a": torch.ones(2), "a_mask": torch.ones(2), "b_orig": torch.ones(2)}
    state |= {"c_orig": torch.ones(2), "c_mask": torch.ones(3)}
    assert read_weights(saved(state, tmp_path / "odd.pth")).tensors.keys() == state.keys()


def test_the_bytes_of_a_file_count_and_not_its_name(tmp_path: Path) -> None:
    state = small_state()
    save_file(state, tmp_path / "a.pth")
    torch.save(state, tmp_path / "b.safetensors")
    for name in ("a.pth", "b.safetensors"):
        assert torch.equal(read_weights(tmp_path / name).tensors["conv.weight"], state["conv.weight"])


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            "Git LFS.* git lfs pull",
        ),
        (b"<!DOCTYPE html><html><title>Sign in</title></html>", "is a web page; download the file again"),
        (b"\x08\n\x12\x07pytorch\x1a\x062.14.1", "probably an ONNX model; give weights in safetensors"),
        (b"\x08\x02" + bytes(6) + b'{"conv.weight":', r"truncated"),
    ],
)
def test_what_holds_no_weights_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / name)


def test_a_nested_file_is_no_checkpoint(tmp_path: Path) -> None:
    save_file({"level1/values/conv.weight": torch.ones(2)}, tmp_path / "nested.safetensors")
    with pytest.raises(CheckpointError, match=r"is a nested file; .* nestify export"):
        read_weights(tmp_path / "nested.safetensors")


def test_a_pickled_model_does_not_say_how_to_run_it(tmp_path: Path) -> None:
    path = saved(nn.Linear(1, 1), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"holds objects .* save only its state_dict") as caught:
        read_weights(path)
    assert "weights_only" not in str(caught.value)
