"""Whatever foreign code raises on what a user brings ends with the exit code of bad input, never with 70."""

import csv
import os
import random
import shutil
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from tests.cli.driver import CHECKPOINT, QUICK, nestify
from tests.file.damage import damage

BAD_FILE, BAD_RECIPE = 3, 2


@pytest.fixture
def copy(digits_file: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(digits_file, tmp_path / "copy.safetensors"))


# Nested files


@pytest.mark.parametrize(
    "kwargs",
    [
        {"drop_rate": 1e308},
        {"block": "x"},
        {"global_pool": True},
        {"block_reduce_first": 0},
        {"device": "meta"},
        {"dtype": "float16"},
        {"layers": [10**9] * 4},
        {"channels": [60_000] * 4},
        {"output_stride": -1},
        {"act_layer": "x"},
        {"unheard_of": 1},
    ],
)
def test_kwargs_of_a_nested_file(kwargs: dict[str, Any], copy: Path) -> None:
    damage(copy, lambda parts: parts.manifest["model"]["kwargs"].update(kwargs))
    for words in (("verify", copy), ("eval", copy, "--data", "embedded/digits")):
        done = nestify(*words)
        assert done.code == BAD_FILE, done.err
        assert next(iter(kwargs)) in done.out + done.err


@pytest.mark.parametrize(
    ("architecture", "kwargs"),
    [("test_vit", {"patch_size": 0}), ("test_vit", {"mlp_ratio": 1e308}), ("test_vit", {"depth": 200_000})],
)
def test_another_architecture(architecture: str, kwargs: dict[str, Any], copy: Path) -> None:
    damage(copy, lambda parts: parts.manifest["model"].update(architecture=architecture, kwargs=kwargs))
    assert nestify("verify", copy).code == BAD_FILE


def random_value(generator: random.Random, depth: int = 0) -> Any:
    """Return a value as JSON can hold it, often an extreme one."""
    kind = generator.randrange(6 if depth < 2 else 5)
    if kind == 0:
        return generator.choice([True, False, None])
    if kind == 1:
        return generator.choice([0, 1, 2, 3, 8, 64, 4096, 10**5, 10**9, 2**63])
    if kind == 2:
        return -generator.choice([1, 2, 64, 10**9])
    if kind == 3:
        return generator.choice([0.0, 0.5, -0.5, 1e-308, 1e308, -1e308, 2.5, 1e7])
    if kind == 4:
        return generator.choice(
            ["", "x", "avg", "relu", "gelu", "batchnorm2d", "\x00", "bottleneck", "\x1b[0m"]
        )
    return [random_value(generator, depth + 1) for _ in range(generator.randrange(5))]


NAMES = (
    *("layers", "channels", "block", "global_pool", "in_chans", "num_classes", "cardinality", "base_width"),
    *("stem_width", "stem_type", "replace_stem_pool", "block_reduce_first", "down_kernel_size", "avg_down"),
    *(
        "act_layer",
        "norm_layer",
        "aa_layer",
        "drop_rate",
        "drop_path_rate",
        "drop_block_rate",
        "zero_init_last",
    ),
    *("block_args", "output_stride", "features_only", "scriptable", "exportable", "no_jit", "img_size"),
)
"""Arguments of timm's ResNet and of `create_model`."""


@pytest.mark.parametrize("count", [20, pytest.param(60, marks=pytest.mark.long)])
def test_random_kwargs(copy: Path, count: int) -> None:
    generator = random.Random(15)
    original = copy.read_bytes()
    codes = set()
    for _ in range(count):
        kwargs = {name: random_value(generator) for name in generator.sample(NAMES, generator.randint(1, 3))}
        copy.write_bytes(original)
        damage(copy, lambda parts: parts.manifest["model"]["kwargs"].update(kwargs))  # noqa: B023
        done = nestify("verify", copy)
        assert done.code in (0, BAD_FILE), (kwargs, done.err)
        codes.add(done.code)
    assert BAD_FILE in codes


@pytest.mark.parametrize(
    "changes",
    [
        {"input_size": [3, 100_000, 100_000]},
        {"input_size": [10**12, 1, 1]},
        {"crop_pct": 0.01, "input_size": [3, 3000, 3000]},
        {"crop_pct": 100},
        {"interpolation": "x"},
    ],
)
def test_preprocessing_of_a_nested_file(changes: dict[str, Any], copy: Path) -> None:
    damage(copy, lambda parts: parts.manifest["model"]["preprocessing"].update(changes))
    done = nestify("eval", copy, "--data", "embedded/digits", "--max-images", "4")
    assert done.code == BAD_FILE, done.err
    assert next(iter(changes)) in done.err


def test_a_long_name_of_a_level(copy: Path) -> None:
    damage(copy, lambda parts: parts.manifest["levels"][0].update(name="x" * 300))
    done = nestify("bench", copy, "--rounds", "2")
    assert done.code == BAD_FILE
    assert "300 characters" in done.message


def test_a_model_that_cannot_be_built_is_not_tried_for_every_level(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nestify.file import loading

    tried = []
    build = loading.build_model

    def count(*args: Any, **options: Any) -> Any:
        tried.append(args)
        return build(*args, **options)

    monkeypatch.setattr(loading, "build_model", count)
    damage(copy, lambda parts: parts.manifest["model"]["kwargs"].update(block="x"))
    done = nestify("verify", copy)
    assert done.code == BAD_FILE
    assert done.out.count("'x'") == 3  # a line per level
    assert len(tried) == 1


# Recipes


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", f'extends = "{"x" * 5000}"'),
        ("a.toml", f'extends = "{"x" * 5000}.toml"'),
        ("a.toml", r'extends = "a\u0000b.toml"'),
        ("a.toml", f"a{'.a' * 3000} = 1"),
        ("a.toml", f"[train{'.a' * 3000}]\nx = 1"),
        ("a.toml", f"[matrix]\ntrain{'.a' * 3000} = [1]"),
        ("a.toml", f"x = {'[' * 300}{']' * 300}"),
        ("a.toml", f"x = {'[' * 30_000}"),
        ("a.toml", 'extends = "digits"\n[train]\nlr = nan'),
        ("a.toml", 'extends = "digits"\n[train]\nepochs = inf'),
        ("a.toml", 'extends = "digits"\n[train]\nepochs = 1e308'),
        ("a.toml", f'extends = "digits"\nseed = {"9" * 400}'),
        ("a.json", r'{"\ud800": 1}'),
        ("a.json", r'{"model": {"name": "\ud800"}}'),
        ("a.json", '{"a":' * 900 + "1" + "}" * 900),
        ("a.json", "[" * 100_000),
        ("a.json", f'{{"seed": 1{"0" * 4000}}}'),
        ("a.json", f'{{"seed": 1{"0" * 5000}}}'),
        ("a.json", '{"extends": "digits", "train": {"lr": NaN}}'),
        ("a.json", '{"extends": "digits", "train": {"lr": 1e999}}'),
        ("a.json", '{"extends": "digits", "train": {"epochs": -Infinity}}'),
    ],
)
def test_recipes(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    done = nestify("compress", tmp_path / name, "--dry-run")
    assert done.code == BAD_RECIPE, done.err
    assert len(done.err) < 4000


@pytest.mark.parametrize(
    "setting",
    [
        f"train.{'a.' * 3000}b=1",
        f"x={'[' * 500}{']' * 500}",
        f"x={'[' * 50_000}",
        "train.lr=nan",
        "train.epochs=1e308",
        f"seed={'9' * 5000}",
        "\ud800=1",
        "train.opt=\ud800",
        "train.opt=x\x1b",
        "device=maia",
    ],
)
def test_settings(setting: str) -> None:
    done = nestify("compress", "digits", "--dry-run", "--set", setting)
    assert done.code == BAD_RECIPE, done.err


@pytest.mark.parametrize("value", ["x" * 5000, "x\x00.pth", "x" * 300 + ".pth"])
def test_names_that_no_system_accepts(value: str, copy: Path) -> None:
    for words in (
        ("report", value),
        ("compress", value),
        ("compress", "digits", "--checkpoint", f"{value}.pth"),
        ("compress", "digits", "--data", value),
        ("compress", "digits", "--hierarchy", value),
        ("compress", "digits", "--epochs", "0", "-o", value),
        ("eval", copy, "--data", value),
        ("export", copy, "--level", "1", "--format", "onnx", "-o", f"{value}.onnx"),
        ("slice", copy, "--level", "1", "-o", value),
        ("report", copy, "--compare", value),
        ("report", copy, "--check", value),
    ):
        assert nestify(*words).code in (BAD_RECIPE, BAD_FILE), words


# Addresses


@pytest.mark.parametrize(
    "address",
    [
        *("http://[::1/x", "http://[::1]/x:99999", "http://[/", "http://[]/x", "https://", "http://[v1.x]/x"),
        *("http://localhost:99999/x", "http://localhost:-1/x", f"http://localhost:{'9' * 5000}/x"),
        *("http://a\x1b/x", "http://\x00/x", "http://\u202e/x", "http://\ud800/x", "http://a b/x"),
        *(f"http://{'a' * 10**5}/x", f"http://{'a.' * 5000}/x", "http://xn--/x", "hf://a", "hf://a/b/\x00"),
    ],
)
def test_addresses(address: str, tmp_path: Path) -> None:
    for words in (("report", address), ("slice", address, "--level", "1", "-o", tmp_path / "a.safetensors")):
        done = nestify(*words)
        assert done.code == BAD_FILE, done.err
        assert done.err.removesuffix("\n").isprintable()


# Hierarchies, tars and checkpoints


@pytest.mark.parametrize(
    "text",
    [
        "class,coarse\n0,a\x1b\n",
        "class,co\x1b\n0,a\n",
        "class,\u3164\n0,a\n",
        "class,coarse\n0,a\x00b\n",
        "class,coarse\n0,\u202ea\n",
        'class,coarse\n0,"a\nb"\n',
        f"class,coarse\n0,{'x' * (csv.field_size_limit() + 1)}\n",
        "\x00" * 100,
        'class,coarse\n"0\n',
    ],
)
def test_hierarchies(text: str, tmp_path: Path) -> None:
    (tmp_path / "classes.csv").write_text(text, encoding="utf-8")
    done = nestify("compress", "digits", *QUICK, "--hierarchy", tmp_path / "classes.csv")
    assert done.code == BAD_FILE, done.err
    assert "classes.csv: " in done.message


def test_a_hierarchy_that_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "classes.csv")
    for path in (tmp_path / "classes.csv", tmp_path):
        assert nestify("compress", "digits", *QUICK, "--hierarchy", path).code == BAD_FILE


@pytest.mark.parametrize(
    "record", [b"999999999999 path", b"-5 path=", b"0 path=x", b"\xff\xff path=", b"3 p\n"]
)
def test_tars_with_broken_headers(record: bytes, copy: Path, tmp_path: Path) -> None:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("x" * 200 + "/0/a.png"))
    content = bytearray(buffer.getvalue())
    begin = 512  # the records follow the header of the extended headers
    assert content[begin:].startswith(b"218 path=")
    content[begin : begin + len(record)] = record
    (tmp_path / "images.tar").write_bytes(content)
    done = nestify("eval", copy, "--data", tmp_path / "images.tar")
    assert done.code == BAD_FILE, done.err


@pytest.mark.parametrize(
    "kwargs",
    ["layers=[2000000,1,1,1]", "channels=[2000000,8,8,8]", "depth=200000", "act_layer='x'", "dtype='x'"],
)
def test_kwargs_of_a_recipe(kwargs: str) -> None:
    words = ("compress", "test_resnet", "--checkpoint", CHECKPOINT, "--data", "embedded/digits")
    done = nestify(*words, "--input-size", "32", "--set", f"model.kwargs.{kwargs}")
    assert done.code == BAD_FILE, done.err
    assert "model.kwargs" in done.message
