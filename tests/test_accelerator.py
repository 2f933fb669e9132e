"""Facts about devices, and the kernels of a GPU."""

import pytest
import torch

from nestify import accelerator
from nestify.accelerator import clock_of, fast_kernels, fork_random_states, has_tf32, pick_device
from nestify.compression.defaults import with_fast_computing
from nestify.errors import RecipeError
from nestify.recipe.recipe import load_recipe

GPU, CPU = torch.device("cuda"), torch.device("cpu")
FAST = ("amp", "channels_last", "tf32", "cudnn_benchmark")


def kernels() -> tuple[str, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark


@pytest.mark.parametrize("fast", [True, False])
def test_kernels_of_a_gpu_are_chosen_in_the_block_alone(fast: bool) -> None:
    before = kernels()

    def fail() -> None:
        with fast_kernels(GPU, tf32=fast, benchmark=fast):
            assert kernels() == ("high" if fast else "highest", fast, fast)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert kernels() == before


def test_kernels_of_a_cpu_stay() -> None:
    before = kernels()
    with fast_kernels(CPU, tf32=True, benchmark=True):
        assert kernels() == before


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [((7, 5), None, False), ((8, 0), None, True), ((9, 0), None, True), ((9, 0), "6.2", False)],
)
def test_tf32(
    capability: tuple[int, int], hip: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert has_tf32(GPU) == expected
    assert not has_tf32(CPU)


def test_fast_options_are_on_for_a_gpu_unless_the_recipe_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    train = with_fast_computing(load_recipe("digits"), GPU).train
    assert [getattr(train, key) for key in FAST] == [True, True, False, True]
    off = load_recipe("digits", {f"train.{key}": False for key in FAST})
    assert with_fast_computing(off, GPU) == off


def test_a_cpu_leaves_them_off_and_the_stored_recipe_as_it_was() -> None:
    recipe = with_fast_computing(load_recipe("digits"), CPU).to_dict()["train"]
    assert (recipe["amp"], recipe["channels_last"]) == (False, False)
    assert not {"tf32", "cudnn_benchmark"} & recipe.keys()
    on = load_recipe("digits", {"train.amp": True, "train.channels_last": True})
    assert with_fast_computing(on, CPU) == on


def test_auto_takes_a_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=available: found)
        assert pick_device("auto").type == expected


def test_processes_need_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    variables = {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for device in ("auto", "cuda", "cuda:0"):
        with pytest.raises(RecipeError, match=r"2 GPUs for 4 processes.*--nproc-per-node 2"):
            pick_device(device)
    assert pick_device("cpu") == CPU


def test_random_states_of_the_cpu_are_restored() -> None:
    before = torch.get_rng_state()
    with fork_random_states(CPU):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_clocks_of_all_accelerators_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    devices = [torch.device(name) for name in ("mps", "cuda:1", "cpu")]
    for device in devices:
        clock_of(device)()
    assert waited == devices[:2]
    assert accelerator.GPU == "cuda"
