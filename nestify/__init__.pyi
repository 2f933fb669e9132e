"""The public names of nestify and the modules that define them; `__init__.py` reads this list."""

from nestify.api import Result as Result
from nestify.api import compress as compress
from nestify.api import load as load
from nestify.api import plan as plan
from nestify.batching.batch import BatchResult as BatchResult
from nestify.batching.batch import run_batch as run_batch
from nestify.benching import Bench as Bench
from nestify.benching import bench as bench
from nestify.evaluating import Evaluation as Evaluation
from nestify.evaluating import evaluate as evaluate
from nestify.export_formats.level import Exported as Exported
from nestify.exporting import export as export
from nestify.nested_file.slicing import Sliced as Sliced
from nestify.nested_file.slicing import slice_file as slice_file
from nestify.nested_file.slicing import upgrade_slice as upgrade_slice
from nestify.nested_model import NestedModel as NestedModel
from nestify.picking import Limit as Limit
from nestify.picking import Pick as Pick
from nestify.picking import pick as pick
from nestify.recipe import Recipe as Recipe
from nestify.recipe import load_recipe as load_recipe
from nestify.recipe_gates import load_gates as load_gates
from nestify.report.compare import compare as compare
from nestify.report.document import read_report as read_report
from nestify.report.gates import check_gates as check_gates
from nestify.report.stored import open_report as open_report
from nestify.verification import Verification as Verification
from nestify.verification import verify as verify

__version__: str
