"""Which families of timm models have blocks that a level can skip? Tries small models of each.

    python tests/benchmarks/layers.py                       # all families, an hour on one core
    python tests/benchmarks/layers.py --only vgg,swin_transformer
    python tests/benchmarks/layers.py --markdown > layers.md

Random weights, small images, double precision where the model can. A family works where all blocks can be
skipped together, all that are modules, two random halves of them, and one alone: with finite logits, those
of timm's own model in which the same modules do nothing, with the parameters that these depend on, and with
the MACs that were planned. What a branch computes may be no module; `compared` says how many of the sets
could be compared with timm.
Differences are relative to the largest logit. The smallest models of a family may have no block, so up to
five are tried.
"""

import sys
import time
import warnings
from itertools import islice
from pathlib import Path

from apart import Tell, example, walk_families

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own deprecations while it is imported by others
    import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.family_walk import small_models
from tests.model.graph.skipping import walk_blocks

MODELS = 5
"""How many of a family are tried until one has blocks."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Of the differences; some models compute in float32 whatever they are given."""
COLUMNS = ("variant", "input", "modules", "branches", "MACs in blocks", "compared", "off", "seconds")


def _try(family: str, tell: Tell) -> str:
    additions = []
    for name in islice(small_models(family), MODELS):
        model, images = None, None  # free the last one
        model, images = example(name)
        tell({"variant": name, "input": f"{images.shape[-1]}x{images.shape[-1]}"})
        start = time.perf_counter()
        try:
            walked = walk_blocks(model, images)
        except AssertionError as error:
            return f"WRONG: {error}"
        tell(
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
            return "WRONG: other logits than timm's"
        if walked.tried:
            return "works" if walked.compared else "works, as far as it goes without timm's logits"
        additions.append(walked.additions)
    return f"refused: none of the {', '.join(map(str, additions))} additions of the models tried is residual"


if __name__ == "__main__":
    sys.exit(walk_families(__doc__ or "", COLUMNS, _try))
