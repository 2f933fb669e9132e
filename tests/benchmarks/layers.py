"""Which families of timm models have blocks that a level can skip? Tries small models of each.

    python tests/benchmarks/layers.py                       # all families, an hour on one core
    python tests/benchmarks/layers.py --only vgg,swin_transformer
    python tests/benchmarks/layers.py --markdown > layers.md

Uses random weights, small images, and double precision if the model allows it. A family works if these sets
of blocks can be skipped: all blocks, all blocks that are modules, two random halves of them, and a single
block. For each set, the logits must be finite and equal to those of timm's own model in which the same
modules do nothing, the parameters must be those that these logits depend on, and the MACs must be the
planned MACs. A branch need not be a module; `compared` is the number of sets that could be compared with
timm. Differences are relative to the largest logit. The smallest models of a family may have no blocks, so
up to five models are tried.
"""

import sys
import time
import warnings
from itertools import islice
from pathlib import Path

from apart import SendCells, example, walk_families

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own deprecation warnings on import
    import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.family_walk import small_models
from tests.model.graph.skipping import walk_blocks

MODELS = 5
"""Largest number of models of a family that are tried until one has blocks."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest allowed difference; some models compute in float32 regardless of the type of their input."""
COLUMNS = ("variant", "input", "modules", "branches", "MACs in blocks", "compared", "off", "seconds")


def _try(family: str, send: SendCells) -> str:
    additions = []
    for name in islice(small_models(family), MODELS):
        model, images = None, None  # free the previous model
        model, images = example(name)
        send({"variant": name, "input": f"{images.shape[-1]}x{images.shape[-1]}"})
        start = time.perf_counter()
        try:
            walked = walk_blocks(model, images)
        except AssertionError as error:
            return f"WRONG: {error}"
        send(
            {
                "modules": str(walked.modules),
                "branches": str(walked.branches),
                "MACs in blocks": f"{walked.share:.2f}",
                "compared": f"{walked.compared} of {walked.tried}",
                "off": f"{walked.error:.0e}",
                "seconds": f"{time.perf_counter() - start:.1f}",
            }
        )
        if walked.error > TOLERANCE[images.dtype]:
            return "WRONG: the logits differ from timm's"
        if walked.tried:
            return "works" if walked.compared else "works, not compared with timm's logits"
        additions.append(walked.additions)
    return f"refused: none of the {', '.join(map(str, additions))} additions of the models tried is residual"


if __name__ == "__main__":
    sys.exit(walk_families(__doc__ or "", COLUMNS, _try))
