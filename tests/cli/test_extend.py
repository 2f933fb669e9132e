"""`nestify extend`: the levels of a file stay byte for byte, and devices upgrade to the larger file."""

import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import nestify as package
from nestify.file.manifest import Manifest
from nestify.file.reader import open_nested_file
from tests.cli.driver import CHECKPOINT, DIGITS, Outcome, interrupt, nestify

TWO_STEPS = (
    *("--epochs", "1", "--batch-size", "16", "--max-train", "32", "--max-val", "20"),
    *("--set", "train.recalibrate_batches=2", "--set", "train.eval_before=false"),
)
ORIGINAL = ("--checkpoint", str(CHECKPOINT), "--data", str(DIGITS))
KWARGS = {"img_size": 32, "patch_size": 8, "depth": 3}
OUTPUT = Path("top.nested.safetensors")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a transformer of three blocks with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=10, **KWARGS).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def sparse_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that ends at a sparse level; shared, so that tests must not change it."""
    path = tmp_path_factory.mktemp("sparse") / "sparse.nested.safetensors"
    done = nestify("compress", "digits", "--levels", "0.95,0.8", *TWO_STEPS, "-o", path)
    assert done.code == 0, done.err
    return path


def manifest(path: str | Path) -> Manifest:
    return open_nested_file(path).manifest


def chunks(path: str | Path) -> list[bytes]:
    """Return the bytes of each level's chunk, core first."""
    file = open_nested_file(path)
    data = Path(path).read_bytes()[file.header_bytes :]
    return [data[begin:end] for begin, end in zip((0, *file.layout.ends), file.layout.ends, strict=False)]


def combined(path: Path) -> str:
    path.write_text(
        'extends = "digits"\n[schedule]\nkind = "combined"\n'
        "[[level]]\nwidth = 0.5\nsparsity = 0.8\n[[level]]\nwidth = 1.0\nsparsity = 0.5\n"
        "[[level]]\nwidth = 1.0\nsparsity = 0.0\n"
    )
    return str(path)


@pytest.mark.parametrize(
    ("options", "keep", "added"),
    [
        pytest.param(["--levels", "0.95,0.8,0.5"], 3, "0", marks=pytest.mark.long),
        pytest.param(["--levels", "0.95,0.8,0"], 1, "0.6,0.3,0", marks=pytest.mark.long),
        pytest.param(
            ["--levels", "0.95,0.8,0", "--score", "erk", "--skip", "first"], 2, "0", marks=pytest.mark.long
        ),
        pytest.param(["--levels", "0.9,0.8,0", "--dtype", "bfloat16"], 2, "0.1", marks=pytest.mark.long),
        pytest.param(["--levels", "0.9,0.8,0", "--pattern", "8x1"], 1, "0.5,0", marks=pytest.mark.long),
        pytest.param(["--levels", "1:4,2:4,0"], 1, "2:4,3:4,0", marks=pytest.mark.long),
        pytest.param(["--levels", "0.9,0.5,0", "--bn", "recalibrate"], 2, "0", marks=pytest.mark.long),
        pytest.param(["--schedule", "channel", "--levels", "0.5,1"], 1, "0.75,1", marks=pytest.mark.long),
        pytest.param(["--schedule", "channel", "--levels", "0.25,0.5,1"], 2, "1", marks=pytest.mark.long),
        pytest.param(
            ["--schedule", "channel", "--levels", "macs=0.25,macs=0.5,1"], 2, "1", marks=pytest.mark.long
        ),
        (["combined"], 2, "1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_levels_stay_and_old_slices_upgrade(
    options: list[str], keep: int, added: str, tmp_path: Path
) -> None:
    recipe = combined(tmp_path / "combined.toml") if options == ["combined"] else "digits"
    options = [] if options == ["combined"] else options
    assert nestify("compress", recipe, *options, *TWO_STEPS, "-o", "whole.safetensors").code == 0
    assert nestify("slice", "whole.safetensors", "--level", str(keep), "-o", "field.safetensors").code == 0
    assert nestify("slice", "whole.safetensors", "--level", "1", "-o", "core.safetensors").code == 0
    done = nestify("extend", "field.safetensors", "--levels", added, *ORIGINAL, "-o", OUTPUT)
    assert done.code == 0, done.err

    n = keep + added.count(",") + 1
    old, new = manifest("field.safetensors"), manifest(OUTPUT)
    assert len(new.levels) == n
    assert [level.sha256 for level in new.levels[:keep]] == [level.sha256 for level in old.levels]
    assert chunks(OUTPUT)[:keep] == chunks("field.safetensors")
    assert all(level.metrics.top1 is not None for level in new.levels)
    assert nestify("verify", OUTPUT).code == 0

    for name in ("core.safetensors", "field.safetensors"):
        upgraded = nestify("slice", OUTPUT, "--level", str(n), "--upgrade", name)
        assert upgraded.code == 0, upgraded.err
        assert Path(name).read_bytes() == OUTPUT.read_bytes()


@pytest.mark.long
def test_blocks(vit: Path) -> None:
    """A shallower level of a transformer: norms and biases of its blocks stay too."""
    kwargs = "model.kwargs={img_size=32, patch_size=8, depth=3}"
    made = nestify(
        *("compress", "digits", "--set", "model.name=test_vit", "--checkpoint", vit, "--set", kwargs),
        *("--schedule", "layer", "--levels", "0.3,0.6,1", *TWO_STEPS, "-o", "whole.safetensors"),
    )
    assert made.code == 0, made.err
    assert nestify("slice", "whole.safetensors", "--level", "1", "-o", "field.safetensors").code == 0
    options = ("--checkpoint", vit, "--data", DIGITS, "-o", OUTPUT)
    done = nestify("extend", "field.safetensors", "--levels", "0.6,1", *options)
    assert done.code == 0, done.err
    assert chunks(OUTPUT)[:1] == chunks("field.safetensors")
    assert nestify("slice", OUTPUT, "--level", "3", "--upgrade", "field.safetensors").code == 0
    assert nestify("verify", "field.safetensors").code == 0


def test_new_weights_start_from_the_original(sparse_file: Path) -> None:
    """Without training, the new level has the checkpoint's weights where the lower levels have none."""
    done = nestify("extend", sparse_file, "--levels", "0", *ORIGINAL, "--epochs", "0", "-o", OUTPUT)
    assert done.code == 0, done.err
    lower = package.load(sparse_file)
    top, original = package.load(OUTPUT).shared_tensors(), load_file(CHECKPOINT)
    for name, entry in lower.entry.items():
        used = entry <= 2
        assert torch.equal(top[name][~used], original[name][~used])
        assert torch.equal(top[name][used], lower.shared_tensors()[name][used])
        assert not torch.equal(original[name][used], lower.shared_tensors()[name][used])


def test_what_the_file_says(sparse_file: Path) -> None:
    """The manifest stays that of the file, and the new level says which run added it."""
    done = nestify("extend", sparse_file, "--levels", "0", *ORIGINAL, "--seed", "7", "-o", OUTPUT, "--json")
    assert done.code == 0, done.err
    old, new = manifest(sparse_file), manifest(OUTPUT)
    assert (new.recipe, new.seed, new.original) == (old.recipe, 42, old.original)
    first, second, third = new.levels
    assert first.extension is None
    assert second.extension is None
    assert third.extension is not None
    assert third.extension.recipe["seed"] == 7
    assert third.extension.source_sha256 == old.source_sha256
    assert third.extension.recipe["train"]["epochs"] == old.recipe["train"]["epochs"]  # type: ignore[index,call-overload]
    assert [level["name"] for level in done.document["levels"]] == ["level1", "level2", "level3"]
    shown = nestify("report", OUTPUT)
    assert "level3" in next(line for line in shown.out.splitlines() if "added" in line)


@pytest.mark.long
def test_a_file_can_be_extended_twice(sparse_file: Path) -> None:
    once = nestify("extend", sparse_file, "--levels", "0.5", *ORIGINAL, "-o", "once.safetensors")
    assert once.code == 0, once.err
    twice = nestify("extend", "once.safetensors", "--levels", "0", *ORIGINAL, "-o", OUTPUT)
    assert twice.code == 0, twice.err
    assert chunks(OUTPUT)[:3] == chunks("once.safetensors")
    assert chunks(OUTPUT)[:2] == chunks(sparse_file)


def test_python_twin_and_default_output(sparse_file: Path, tmp_path: Path) -> None:
    options = {"model.checkpoint": CHECKPOINT, "data.path": DIGITS}
    result = package.extend(sparse_file, "0", options, observer=package.Observer())
    assert result.path == Path("sparse.extended.nested.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {result.path.name, "sparse.extended.metrics.jsonl"}
    assert result.report is not None
    assert [level.name for level in result.report.levels] == ["level1", "level2", "level3"]


def test_a_level_in_place(sparse_file: Path) -> None:
    shutil.copy(sparse_file, "mine.safetensors")
    assert (
        nestify("extend", "mine.safetensors", "--levels", "0", *ORIGINAL, "-o", "mine.safetensors").code == 0
    )
    assert chunks("mine.safetensors")[:2] == chunks(sparse_file)
    again = nestify("extend", "mine.safetensors", "--levels", "0", *ORIGINAL)
    assert again.code == 2
    assert "full level already" in again.message
    assert "nestify slice" in again.message


def refused(*words: str | Path) -> Outcome:
    done = nestify("extend", *words, "-o", OUTPUT)
    assert not OUTPUT.exists()
    assert done.out == ""
    return done


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--levels", "0.9"], ["level[3].sparsity = 0.9", "not below level[2].sparsity = 0.8"]),
        (["--levels", "0.8"], ["level[3].sparsity = 0.8", "not below"]),
        (["--levels", "0,0.5"], ["level[4].sparsity = 0.5"]),
        (["--levels", "1"], ["level[3].sparsity = 1.0", "[0, 1)"]),
        (["--levels", "wide"], ["wide", "sparsity", "schedule.pattern", "(flag: --levels)"]),
        (["--levels", "macs=0.5,0"], ["level[3].budget", "give sparsities"]),
        (["--levels", "0", "--set", "schedule.kind=channel"], ["schedule.kind", "leave it out"]),
        (["--levels", "0", "--set", "level[1].sparsity=0.9"], ["level[1].sparsity", "leave it out"]),
        (["--levels", "0", "--set", "dtype=float16"], ["dtype", "leave it out"]),
        (["--levels", "0", "--set", "train.lrr=1"], ["train.lrr", "train.lr"]),
    ],
    ids=lambda value: " ".join(value[1:]) if len(value) != 1 else "",
)
def test_wrong_levels_and_options(options: list[str], said: list[str], sparse_file: Path) -> None:
    done = refused(sparse_file, *options, *ORIGINAL)
    assert done.code == 2
    assert all(text in done.message for text in said), done.message


def test_missing_inputs(sparse_file: Path) -> None:
    no_checkpoint = refused(sparse_file, "--levels", "0", "--data", DIGITS)
    assert (no_checkpoint.code, "--checkpoint" in no_checkpoint.err) == (2, True)
    no_data = refused(sparse_file, "--levels", "0", "--checkpoint", CHECKPOINT)
    assert (no_data.code, "--data" in no_data.err) == (2, True)


def test_other_models_and_files(sparse_file: Path, vit: Path, tmp_path: Path) -> None:
    data = ("--data", DIGITS)
    other = refused(sparse_file, "--levels", "0", "--checkpoint", vit, *data)
    assert other.code == 3
    assert "vit.safetensors" in other.message
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), "seven.safetensors")
    classes = refused(sparse_file, "--levels", "0", "--checkpoint", "seven.safetensors", *data)
    assert classes.code == 3
    assert "7 classes" in classes.message
    plain = refused(CHECKPOINT, "--levels", "0", *ORIGINAL)
    assert plain.code == 3
    damaged = bytearray(sparse_file.read_bytes())
    damaged[-100] ^= 1
    Path("damaged.safetensors").write_bytes(damaged)
    assert refused("damaged.safetensors", "--levels", "0", *ORIGINAL).code == 3


@pytest.mark.long  # test_a_level_in_place ends with the same refusal
def test_files_that_cannot_be_extended(tmp_path: Path) -> None:
    full = nestify("compress", "digits", *TWO_STEPS, "-o", "full.safetensors")
    assert full.code == 0
    done = refused("full.safetensors", "--levels", "0", *ORIGINAL)
    assert done.code == 2
    assert "nestify slice" in done.message


def test_a_checkpoint_that_is_not_the_original_is_noticed(sparse_file: Path) -> None:
    weights = {name: tensor + 0 for name, tensor in load_file(CHECKPOINT).items()}
    weights["fc.bias"] = weights["fc.bias"] + 1
    save_file(weights, "tuned.safetensors")
    data = ("--data", DIGITS, "-o", OUTPUT)
    done = nestify("extend", sparse_file, "--levels", "0", "--checkpoint", "tuned.safetensors", *data)
    assert done.code == 0
    assert "SHA-256 differs" in done.err


FEW = (
    *("--max-train", "32", "--max-val", "20", "--batch-size", "16", "--epochs", "3", "--workers", "0"),
    *("--set", "train.eval_before=false"),
)


@pytest.mark.long  # test_resume.py has the same of a whole run
def test_an_interrupted_run_resumes_to_the_same_bytes(sparse_file: Path) -> None:
    command = ("extend", sparse_file, "--levels", "0.4,0", *ORIGINAL, *FEW, "-o", OUTPUT)
    assert nestify(*command).code == 0
    whole = OUTPUT.read_bytes()
    OUTPUT.unlink()
    assert interrupt(3, *command).code == 130
    other = nestify("extend", sparse_file, "--levels", "0.3,0", *ORIGINAL, *FEW, "-o", OUTPUT)
    assert other.code == 2
    again = nestify(*command, "--resume")
    assert again.code == 0, again.err
    assert "resuming at step 3 of 6 of the training" in again.err
    assert OUTPUT.read_bytes() == whole
