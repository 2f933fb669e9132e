"""nestify: n networks of different size in one set of weights, in one file."""

from typing import TYPE_CHECKING

from nestify.version import __version__

if TYPE_CHECKING:
    from nestify.compress.batch.batch import BatchResult, run_batch
    from nestify.compress.compress import Result, compress, plan
    from nestify.evaluate.bench import Bench, bench
    from nestify.evaluate.evaluate import Evaluation, evaluate
    from nestify.evaluate.gates import check_gates
    from nestify.evaluate.pick import Limit, Pick, pick
    from nestify.evaluate.verify import Verification, verify
    from nestify.export.write import Exported, export
    from nestify.file.loading import load
    from nestify.file.slicing import Sliced, slice_file, upgrade_slice
    from nestify.file.summary import open_report, read_report
    from nestify.model.nested_model import NestedModel
    from nestify.recipe.gates import load_gates
    from nestify.recipe.recipe import Recipe, load_recipe
    from nestify.report.compare import compare


_HOME = {
    "bench": "nestify.evaluate.bench",
    "compress": "nestify.compress.compress",
    "evaluate": "nestify.evaluate.evaluate",
    "load": "nestify.file.loading",
    "plan": "nestify.compress.compress",
    "export": "nestify.export.write",
    "slice_file": "nestify.file.slicing",
    "upgrade_slice": "nestify.file.slicing",
    "verify": "nestify.evaluate.verify",
    "run_batch": "nestify.compress.batch.batch",
    "BatchResult": "nestify.compress.batch.batch",
    "pick": "nestify.evaluate.pick",
    "Bench": "nestify.evaluate.bench",
    "Evaluation": "nestify.evaluate.evaluate",
    "Exported": "nestify.export.write",
    "Sliced": "nestify.file.slicing",
    "Verification": "nestify.evaluate.verify",
    "Limit": "nestify.evaluate.pick",
    "Pick": "nestify.evaluate.pick",
    "Result": "nestify.compress.compress",
    "NestedModel": "nestify.model.nested_model",
    "Recipe": "nestify.recipe.recipe",
    "load_recipe": "nestify.recipe.recipe",
    "load_gates": "nestify.recipe.gates",
    "read_report": "nestify.file.summary",
    "open_report": "nestify.file.summary",
    "compare": "nestify.report.compare",
    "check_gates": "nestify.report.evaluation",
}

__all__ = [
    "BatchResult",
    "Bench",
    "Evaluation",
    "Exported",
    "Limit",
    "NestedModel",
    "Pick",
    "Recipe",
    "Result",
    "Sliced",
    "Verification",
    "__version__",
    "bench",
    "check_gates",
    "compare",
    "compress",
    "evaluate",
    "export",
    "load",
    "load_gates",
    "load_recipe",
    "open_report",
    "pick",
    "plan",
    "read_report",
    "run_batch",
    "slice_file",
    "upgrade_slice",
    "verify",
]


def __getattr__(name: str) -> object:
    """Import on first use: the command line must answer without waiting for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'nestify' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
