"""Peak memory of `compress --epochs 0` and of loading, in multiples of the model's float32 weights.

    python tests/benchmarks/memory.py resnet50 vit_base_patch16_224 vit_large_patch16_224

Each measurement is a process of its own, whose peak the system reports. The first one only imports what the
others import.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

BATCH = 4


def peak() -> float:
    """Peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(what: str, model: str, folder: Path) -> None:
    """Do one thing, and print the peak."""
    import torch

    import nestify
    import nestify.compression.compress
    from nestify.schedule import refit

    torch.set_num_threads(1)
    refit.ITERATIONS = 1  # the solver takes as much memory in each
    if what == "compress":
        nestify.compression.compress.compress(
            model,
            {
                "data.path": "embedded/digits",
                "model.pretrained": False,
                "model.input_size": 224,
                "train.epochs": 0,
                "finetune.epochs": 0,
                "train.batch_size": BATCH,
                "train.recalibrate_batches": 1,
                "data.max_train": 16,
                "data.max_val": BATCH,
                "device": "cpu",
                "levels": "0.95,0.8,0",
                "output": str(folder / "model.nested.safetensors"),
            },
            observer=nestify.Observer() if hasattr(nestify, "Observer") else None,
        )
    elif what == "load":
        nestify.load(folder / "model.nested.safetensors")
    elif what == "load core":
        nestify.load(folder / "model.nested.safetensors", level=1)
    print(f"PEAK {peak():.0f}")


def run(what: str, model: str, folder: Path) -> float:
    """Measure in a process of its own; return the peak in bytes."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", what, "--folder", str(folder), model],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("PEAK ")]
    if not found:
        raise SystemExit(done.stderr)
    return float(found[0].removeprefix("PEAK "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--measure")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.models[0], arguments.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = run("import", "-", folder)
        print(f"imports: {base / 1e9:.2f} GB")
        for model in arguments.models:
            peaks = {what: run(what, model, folder) for what in ("compress", "load", "load core")}
            weights = (folder / "model.nested.safetensors").stat().st_size
            for what, bytes_ in peaks.items():
                print(
                    f"{model}: {what}: {bytes_ / 1e9:.2f} GB, {bytes_ / weights:.2f} times the file's "
                    f"{weights / 1e9:.3f} GB ({(bytes_ - base) / weights:.2f} times beyond the imports)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
