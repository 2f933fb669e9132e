"""Nest the backbone of a detector, and train RetinaNet heads for all of its levels in an own loop.

    pip install nestify torchvision
    python recipes/detector.py [STEPS] [LEVELS]    # 2000 steps and the widths 0.25,0.5,1

The images are canvases with one to three of the handwritten digits that are included in nestify. Each level
has its own neck and head, because narrower levels have fewer feature channels. The script prints the loss and
the average precision (IoU 0.5, on images that were not trained on) of each level, and writes
`detector.nested.safetensors`, which holds the backbone of every level. 2000 steps take about five minutes of
one processor and 1 GB of memory.
"""

import argparse
import io
import tarfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, box_iou

import nestify

DIGITS = Path(nestify.__file__).parent / "recipes" / "digits"
SIDE, BATCH, WIDTH = 96, 8, 32  # pixels of a canvas, images of a step, channels of a neck
Boxes = dict[str, Tensor]


def read_digits(split: str) -> list[tuple[Image.Image, int]]:
    with tarfile.open(DIGITS / f"{split}.tar") as tar:
        files = [(tar.extractfile(member), member.name) for member in tar.getmembers() if member.isfile()]
        return [
            (Image.open(io.BytesIO(file.read())), int(name.split("/")[0])) for file, name in files if file
        ]


def make_image(digits: list[tuple[Image.Image, int]], rng: np.random.Generator) -> tuple[Tensor, Boxes]:
    """Paste digits on a canvas, one per column; return the image (3, SIDE, SIDE) and its boxes."""
    canvas, boxes, labels = Image.new("L", (SIDE, SIDE)), [], []
    for column in rng.permutation(3)[: rng.integers(1, 4)]:
        image, label = digits[rng.integers(len(digits))]
        size = int(rng.integers(24, 33))
        left, top = int(column) * 32 + int(rng.integers(0, 33 - size)), int(rng.integers(0, SIDE - size))
        canvas.paste(image.resize((size, size), Image.Resampling.BICUBIC), (left, top))
        boxes.append([left, top, left + size, top + size])
        labels.append(label)
    pixels = torch.from_numpy(np.asarray(canvas, np.float32) / 255).expand(3, -1, -1)
    return (pixels - 0.5) / 0.5, {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)}


class Neck(nn.Module):
    """The feature pyramid of one level, on maps that its backbone has computed already."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.out_channels = WIDTH
        self.pyramid = FeaturePyramidNetwork(list(channels), WIDTH)
        self.maps: list[Tensor] = []

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.pyramid(OrderedDict((str(place), each) for place, each in enumerate(self.maps)))


class Detector(nn.Module):
    """RetinaNet without its backbone: neck, head, anchors and losses."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        sizes = tuple((12 * 2**place, 20 * 2**place) for place in range(len(channels)))
        self.net = RetinaNet(
            Neck(channels), 10, SIDE, SIDE, [0.0] * 3, [1.0] * 3,
            anchor_generator=AnchorGenerator(sizes, ((1.0,),) * len(channels)),
        )  # fmt: skip

    def forward(self, maps: list[Tensor], target: tuple[list[Tensor], list[Boxes] | None]) -> dict:
        """Return the losses in training, or a list of detections."""
        self.net.backbone.maps = maps
        return self.net(*target)

    def loss(self, maps: list[Tensor], target: tuple[list[Tensor], list[Boxes]]) -> Tensor:
        return sum(self(maps, target).values())


def average_precision(found: list[Boxes], wanted: list[Boxes]) -> float:
    """Return the average precision of all classes together; a box is right at an IoU of 0.5 or more."""
    hits, total = [], sum(len(each["labels"]) for each in wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        free = torch.ones(len(theirs["labels"]), dtype=torch.bool)
        for box, label, score in zip(ours["boxes"], ours["labels"], ours["scores"], strict=True):
            overlap = box_iou(box[None], theirs["boxes"])[0] * free * (theirs["labels"] == label)
            best = int(overlap.argmax())
            hits.append((float(score), is_right := bool(overlap[best] >= 0.5)))
            free[best] &= not is_right
    right = np.array([hit for _, hit in sorted(hits, reverse=True)], bool)
    precision = right.cumsum() / np.arange(1, len(right) + 1)
    return 100 * float(precision[right].sum()) / total


def main(steps: int = 2000, levels: str = "0.25,0.5,1") -> list[float]:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = timm.create_model("test_resnet", features_only=True, out_indices=(2, 3, 4))
    model.load_state_dict(load_file(DIGITS / "test_resnet.safetensors"), strict=False)  # no classifier
    digits = read_digits("train")
    first = torch.stack([make_image(digits, rng)[0] for _ in range(BATCH)])
    nested = nestify.nest(model, levels, "channel", images=[first] * 8, input_size=(3, SIDE, SIDE)).train()
    heads = [Detector(nested.feature_channels(level)) for level in range(1, nested.n_levels + 1)]
    parameters = [*nested.parameters(), *nn.ModuleList(heads).parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for step in range(steps):
        images, boxes = zip(*(make_image(digits, rng) for _ in range(BATCH)), strict=True)
        target = (list(images), list(boxes))
        optimizer.zero_grad()
        results = nested.backward(torch.stack(images), target, [head.loss for head in heads])
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(step, *(f"level {result.level}: {result.loss:.3f}" for result in reversed(results)))
    path = nested.save("detector.nested.safetensors")
    held_out = read_digits("validation")
    images, boxes = zip(*(make_image(held_out, rng) for _ in range(64)), strict=True)
    precisions = []
    for level, head in enumerate(heads, start=1):
        with torch.no_grad():
            maps = nestify.load(path, level=level)(torch.stack(images))
            precisions.append(average_precision(head.eval()(maps, (list(images), None)), list(boxes)))
        print(f"level {level}, {nested.feature_channels(level)} channels: AP50 {precisions[-1]:.1f} %")
    return precisions


def parse_steps(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no number of steps; give 1 or more")
    return int(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("steps", type=parse_steps, nargs="?", default=2000, help="training steps")
    parser.add_argument("levels", nargs="?", default="0.25,0.5,1", help="widths of the levels, core first")
    given = parser.parse_args()
    try:
        main(given.steps, given.levels)
    except nestify.NestifyError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
