"""Which families of timm models export to ONNX and pt2? Exports the smallest model of each, and proves it.

    python tests/benchmarks/export_families.py                    # all families, half an hour on one core
    python tests/benchmarks/export_families.py --only vgg,levit --batch 1

Random weights and small images, as in `families.py`. An export counts when it loads again and gives the
model's logits with batches of 1 and 3 (with --batch, of that size alone). Every family has its own process
and a bound on its processor time, so that a busy machine fails none.
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
    warnings.simplefilter("ignore")  # torch's own deprecations while it is imported by others
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
Tell = Callable[[dict[str, str]], None]


def main() -> int:
    """Exit code 1 where an export fails without being refused."""
    options = _options()
    if options.child:
        warnings.simplefilter("ignore")
        resource.setrlimit(resource.RLIMIT_CPU, (options.timeout, options.timeout))
        export_family(options.only, options.batch, _tell)
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


def export_family(family: str, batch: int | None, tell: Tell) -> None:
    """Export the smallest model of a family; `tell` gets its name, then one outcome per format."""
    torch.manual_seed(0)
    name = smallest_model(family)
    model, side = create_plain(name, dict(SMALLER.get(name, {})))
    randomise_constants(model)
    facts = facts_of(model.eval(), side)
    tell({"variant": f"{name} at {facts.input_size[-1]}"})
    for format in FORMATS:
        with TemporaryDirectory() as folder:
            tell({format: _outcome(model, target_in(Path(folder), format), facts, batch)})


def _outcome(model: nn.Module, target: Target, facts: ExportFacts, batch: int | None) -> str:
    try:
        done = export_level(model, facts, target, batch=batch)
    except NestifyError as error:
        return f"refused: {error}"
    except Exception as error:  # whatever happens is the result
        return f"FAILS: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return f"works {done.max_difference:.0e}"


def _export_apart(family: str, batch: int | None, timeout: int) -> dict[str, str]:
    command = [sys.executable, __file__, "--child", "--only", family, "--timeout", str(timeout)]
    command += ["--batch", str(batch)] if batch else []
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    why = f"FAILS: its process ended with exit code {done.returncode}"
    if -done.returncode in (signal.SIGXCPU, signal.SIGKILL):
        why = f"FAILS: not done after {timeout} seconds, or out of memory"
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    outcome = {"variant": "", **dict.fromkeys(FORMATS, why)}
    for part in told:
        outcome |= part
    return outcome


def _tell(part: dict[str, str]) -> None:
    print(json.dumps(part), flush=True)


if __name__ == "__main__":
    sys.exit(main())
