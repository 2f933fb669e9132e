"""Run the page's modules with Node.js."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "nestify" / "demo" / "page"
HERE = Path(__file__).parent
NODE = shutil.which("node")

needs_node = pytest.mark.skipif(NODE is None, reason="Node.js is not installed")


def run_node(script: str, module: str, *words: str | Path) -> list[Any]:
    """Run a script of this folder on a module of the page, and return the JSON lines that it prints."""
    assert NODE is not None
    # The page's modules end with .js, which Node takes for modules only if it is told to.
    command = [
        NODE,
        "--experimental-default-type=module",
        str(HERE / script),
        str(PAGE / module),
        *map(str, words),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
