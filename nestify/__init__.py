"""nestify: n networks of different size in one set of weights, in one file."""

from typing import TYPE_CHECKING

from nestify.version import __version__

if TYPE_CHECKING:
    from nestify.api import Result, compress, plan
    from nestify.batching.batch import BatchResult, run_batch
    from nestify.benching import Bench, bench
    from nestify.evaluating import Evaluation, evaluate
    from nestify.export_formats.level import Exported
    from nestify.exporting import export
    from nestify.file.loading import load
    from nestify.file.slicing import Sliced, slice_file, upgrade_slice
    from nestify.file.summary import open_report, read_report
    from nestify.model.nested_model import NestedModel
    from nestify.picking import Limit, Pick, pick
    from nestify.recipe.gates import load_gates
    from nestify.recipe.recipe import Recipe, load_recipe
    from nestify.report.compare import compare
    from nestify.report.gates import check_gates
    from nestify.verification import Verification, verify


_HOME = {
    "bench": "nestify.benching",
    "compress": "nestify.api",
    "evaluate": "nestify.evaluating",
    "load": "nestify.api",
    "plan": "nestify.api",
    "export": "nestify.exporting",
    "slice_file": "nestify.file.slicing",
    "upgrade_slice": "nestify.file.slicing",
    "verify": "nestify.verification",
    "run_batch": "nestify.batching.batch",
    "BatchResult": "nestify.batching.batch",
    "pick": "nestify.picking",
    "Bench": "nestify.benching",
    "Evaluation": "nestify.evaluating",
    "Exported": "nestify.export_formats.level",
    "Sliced": "nestify.file.slicing",
    "Verification": "nestify.verification",
    "Limit": "nestify.picking",
    "Pick": "nestify.picking",
    "Result": "nestify.api",
    "NestedModel": "nestify.model.nested_model",
    "Recipe": "nestify.recipe.recipe",
    "load_recipe": "nestify.recipe.recipe",
    "load_gates": "nestify.recipe.gates",
    "read_report": "nestify.file.summary",
    "open_report": "nestify.file.summary",
    "compare": "nestify.report.compare",
    "check_gates": "nestify.report.gates",
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
