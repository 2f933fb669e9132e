"""Names of the files that lie beside a nested file."""

from pathlib import Path


def beside(output: Path, ending: str) -> Path:
    """Where another file of a run lies: `resnet.csv` beside `resnet.nested.safetensors`."""
    return output.with_name(output.name.removesuffix(".safetensors").removesuffix(".nested") + ending)
