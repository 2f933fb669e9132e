"""The public names of nestify and the modules that define them; `__init__.py` reads this list."""

from nestify.compression.batch.batch import BatchResult as BatchResult
from nestify.compression.batch.batch import run_batch as run_batch
from nestify.compression.compress import Result as Result
from nestify.compression.compress import compress as compress
from nestify.compression.compress import plan as plan
from nestify.compression.extend import extend as extend
from nestify.compression.own_loop import nest as nest
from nestify.compression.scan import Scan as Scan
from nestify.compression.scan import scan as scan
from nestify.compression.trainable import TrainableNestedModel as TrainableNestedModel
from nestify.demo.write import Demo as Demo
from nestify.demo.write import write_demo as write_demo
from nestify.errors import NestifyError as NestifyError
from nestify.errors import NestifyWarning as NestifyWarning
from nestify.evaluation.bench import Bench as Bench
from nestify.evaluation.bench import bench as bench
from nestify.evaluation.evaluate import Evaluation as Evaluation
from nestify.evaluation.evaluate import evaluate as evaluate
from nestify.evaluation.gates import check_gates as check_gates
from nestify.evaluation.pick import Limit as Limit
from nestify.evaluation.pick import Pick as Pick
from nestify.evaluation.pick import pick as pick
from nestify.evaluation.verify import Verification as Verification
from nestify.evaluation.verify import verify as verify
from nestify.exports.export import export as export
from nestify.exports.write import Exported as Exported
from nestify.file.loading import load as load
from nestify.file.slicing import Sliced as Sliced
from nestify.file.slicing import slice_file as slice_file
from nestify.file.slicing import upgrade_slice as upgrade_slice
from nestify.file.summary import open_report as open_report
from nestify.file.summary import read_report as read_report
from nestify.hub.folder import Card as Card
from nestify.hub.folder import write_card as write_card
from nestify.hub.push import Pushed as Pushed
from nestify.hub.push import push as push
from nestify.model.nested_model import NestedModel as NestedModel
from nestify.recipe.gates import load_gates as load_gates
from nestify.recipe.recipe import Recipe as Recipe
from nestify.recipe.recipe import load_recipe as load_recipe
from nestify.report.compare import compare as compare
from nestify.training.observer import Observer as Observer

__version__: str
