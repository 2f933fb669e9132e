"""Which families of timm models export to ONNX and pt2? Exports the smallest model of each and checks it.

    python tests/benchmarks/export_families.py                    # all families, half an hour on one core
    python tests/benchmarks/export_families.py --only vgg,levit --batch 1

Uses random weights and small images, as `families.py` does. An export works if it can be loaded again and
gives the model's logits with batches of 1 and 3 (with --batch, only of that size). Every family has its own
process and a limit on its processor time, so that no family fails because the machine is busy.
"""

import argparse
import json
import resource
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own deprecation warnings on import
    import timm
    import torch
    from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from nestify.errors import NestifyError
from nestify.exports.target import ExportFacts, Target
from nestify.exports.write import export_level
from tests.exports.builders import facts_of, target_in
from tests.family_walk import SMALLER, create_plain, randomise_constants, smallest_model

FORMATS = ("pt2", "onnx")
SendCells = Callable[[dict[str, str]], None]


def main() -> int:
    """Print the results; return exit code 1 if an export fails without being refused."""
    options = _options()
    if options.child:
        warnings.simplefilter("ignore")
        resource.setrlimit(resource.RLIMIT_CPU, (options.timeout, options.timeout))
        export_family(options.only, options.batch, _print_cells)
        return 0
    results: dict[str, Counter[str]] = {name: Counter() for name in FORMATS}
    for family in options.only.split(",") if options.only else timm.list_modules():
        outcome = _export_apart(family, options.batch, options.timeout)
        print(" | ".join([family, outcome["variant"], *(outcome[name] for name in FORMATS)]), flush=True)
        for name in FORMATS:
            results[name][outcome[name].partition(" ")[0].rstrip(":")] += 1
    for name, counts in results.items():
        print(f"{name}: {', '.join(f'{count} {word}' for word, count in counts.most_common())}")
    return int(any("FAILS" in counts for counts in results.values()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", help="families, separated by commas; all by default", metavar="A,B")
    parser.add_argument("--batch", type=int, help="fix the batch size; any size by default")
    parser.add_argument(
        "--timeout", type=int, default=120, help="processor seconds for each family (default 120)"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def export_family(family: str, batch: int | None, send: SendCells) -> None:
    """Export the smallest model of a family; send its name, then one outcome per format."""
    torch.manual_seed(0)
    name = smallest_model(family)
    model, side = create_plain(name, dict(SMALLER.get(name, {})))
    randomise_constants(model)
    facts = facts_of(model.eval(), side)
    send({"variant": f"{name} at {facts.input_size[-1]}"})
    for format in FORMATS:
        with TemporaryDirectory() as folder:
            send({format: _outcome(model, target_in(Path(folder), format), facts, batch)})


def _outcome(model: nn.Module, target: Target, facts: ExportFacts, batch: int | None) -> str:
    try:
        done = export_level(model, facts, target, batch=batch)
    except NestifyError as error:
        return f"refused: {error}"
    except Exception as error:  # any exception is a result
        return f"FAILS: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return f"works {done.max_difference:.0e}"


def _export_apart(family: str, batch: int | None, timeout: int) -> dict[str, str]:
    command = [sys.executable, __file__, "--child", "--only", family, "--timeout", str(timeout)]
    command += ["--batch", str(batch)] if batch else []
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    failure = f"FAILS: its process ended with exit code {done.returncode}"
    if -done.returncode in (signal.SIGXCPU, signal.SIGKILL):
        failure = f"FAILS: not done after {timeout} seconds, or out of memory"
    outcome = {"variant": "", **dict.fromkeys(FORMATS, failure)}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            outcome |= json.loads(line)
    return outcome


def _print_cells(cells: dict[str, str]) -> None:
    print(json.dumps(cells), flush=True)


if __name__ == "__main__":
    sys.exit(main())
