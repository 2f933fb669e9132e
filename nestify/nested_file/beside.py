"""Names of the files that lie beside a nested file."""

from pathlib import Path


def beside(output: Path, ending: str) -> Path:
    """Where another file of a run lies: `resnet.csv` beside `resnet.nested.safetensors`."""
    return output.with_name(output.name.removesuffix(".safetensors").removesuffix(".nested") + ending)


def metrics_path(output: Path) -> Path:
    """Where the log of a run lies: `resnet.metrics.jsonl` beside `resnet.nested.safetensors`."""
    return beside(output, ".metrics.jsonl")


def checkpoint_path(output: Path) -> Path:
    """Where the checkpoint of a run lies: `resnet.resume.safetensors` beside `resnet.nested.safetensors`."""
    return beside(output, ".resume.safetensors")
