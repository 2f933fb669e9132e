"""Without the packages of extras everything else works, and what needs one says how to install it."""

import os
import subprocess
import sys
from pathlib import Path

from tests.cli.driver import UNTRAINED

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nestify"

EXTRAS = {
    *("onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "coremltools", "executorch", "tensorboard"),
    *("wandb", "mlflow"),
}

NEED_ONNX = ("graph", "graph_int8", "model_graph", "plan", "profile", "quantised_graph", "traced")
"""Modules of the engine that rewrite ONNX models; nobody imports them before there is one."""

HIDE = f"""
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *given: None if name.partition(".")[0] in {EXTRAS} else find(name, *given)
"""
"""Code after which Python finds none of them."""


def run_without_extras(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", HIDE + code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_modules_are_imported(tmp_path: Path) -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__main__.py" and not (path.parent.name == "engine" and path.stem in NEED_ONNX)
    ]
    assert len(names) > 200
    done = run_without_extras(
        f"from importlib import import_module\nfor name in {names}: import_module(name)", tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_commands_run_or_name_what_they_need(tmp_path: Path) -> None:
    """One process runs all of them; each line that it prints is an exit code and the end of an error."""
    file, digits = "digits.nested.safetensors", str(PACKAGE / "recipes" / "digits")
    works = [
        ["compress", "digits", *UNTRAINED, "-o", file],
        ["eval", file, "--data", digits, "--max-images", "20"],
        ["bench", file, "--rounds", "2", "--warmup", "0", "--batch-size", "1"],
        ["report", file],
        ["verify", file],
        ["slice", file, "--level", "1", "-o", "slice.safetensors"],
        ["export", file, "--level", "2", "--format", "timm", "-o", "plain.safetensors"],
        ["doctor"],
    ]
    needs = {
        "pip install": [
            ["export", file, "--level", "1", "-o", "level.onnx"],
            ["export", file, "--level", "1", "--format", "onnx", "--int8", "--data", digits, "-o", "i.onnx"],
            ["eval", file, "--data", digits, "--max-images", "20", "--engine"],
            ["export", file, "--level", "1", "--sparse", "-o", "s.onnx"],
            ["bench", file, "--rounds", "2", "--warmup", "0", "--engine"],
            ["bench", file, "--rounds", "2", "--warmup", "0", "--rivals"],
        ],
        "nestify[openvino]": [["export", file, "--level", "1", "--format", "openvino", "-o", "o.openvino"]],
        "nestify[coreml]": [["export", file, "--level", "1", "--format", "coreml", "-o", "c.mlpackage"]],
    }
    code = f"""
import contextlib, io
from nestify.cli.app import run
for words in {works + [words for given in needs.values() for words in given]}:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(words)
    print(code, (err.getvalue().splitlines() or [""])[-1])
"""
    done = run_without_extras(code, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    for words, line in zip(works, lines, strict=False):
        assert line.startswith("0 "), (words, line)
    told = [(extra, words) for extra, given in needs.items() for words in given]
    for (extra, words), line in zip(told, lines[len(works) :], strict=True):
        assert not line.startswith(("0 ", "70 ")), (words, line)
        assert extra in line, (words, line)
