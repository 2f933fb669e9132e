"""What an exported model says of itself beside its tensors. No torch here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nestify.file.manifest import Manifest
from nestify.version import __version__


@dataclass(frozen=True)
class ExportFacts:
    """What the manifest of a nested file says of one level.

    Attributes:
        kwargs: `timm.create_model(architecture, **kwargs)` builds the model.
        class_names: in the order of the logits; None where the file names none.
        preprocessing: timm's data configuration: input_size (C, H, W), mean, std (per channel, for pixels
            in [0, 1]), interpolation, crop_pct, crop_mode.
        level: 1 for the core.
        sparsity: share of the maskable weights that are zero.
        metrics: what was measured or counted for the level.
    """

    architecture: str
    kwargs: Mapping[str, Any]
    num_classes: int
    class_names: Sequence[str] | None
    preprocessing: Mapping[str, Any]
    level: int
    level_name: str
    sparsity: float
    metrics: Mapping[str, Any]

    @classmethod
    def of(cls, manifest: Manifest, level: int) -> "ExportFacts":
        """The facts of a level, given by its number."""
        model, entry, classes = manifest.model, manifest.levels[level - 1], manifest.num_classes(level)
        return cls(
            architecture=model.architecture,
            kwargs=model.kwargs if classes == model.num_classes else {**model.kwargs, "num_classes": classes},
            num_classes=classes,
            class_names=manifest.class_names(level),
            preprocessing=model.preprocessing.model_dump(mode="json"),
            level=level,
            level_name=entry.name,
            sparsity=entry.achieved_sparsity,
            metrics=entry.metrics.model_dump(mode="json", exclude_none=True),
        )

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of one image, in pixels."""
        channels, height, width = self.preprocessing["input_size"]
        return int(channels), int(height), int(width)

    @property
    def title(self) -> str:
        """The level as messages call it; a name with control characters must not steer a terminal."""
        name = self.level_name if self.level_name.isprintable() else repr(self.level_name)
        return f"level {self.level} ({name}) of {self.architecture}"

    def document(self) -> dict[str, Any]:
        """The facts as one JSON object."""
        return {
            "architecture": self.architecture,
            "kwargs": dict(self.kwargs),
            "num_classes": self.num_classes,
            "classes": None if self.class_names is None else list(self.class_names),
            "preprocessing": dict(self.preprocessing),
            "level": self.level,
            "level_name": self.level_name,
            "sparsity": self.sparsity,
            "metrics": dict(self.metrics),
            "producer": f"nestify {__version__}",
        }

    def metadata(self) -> dict[str, str]:
        """The same for formats that hold strings alone: what is no string is JSON."""
        known = {key: value for key, value in self.document().items() if value is not None}
        return {
            key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for key, value in known.items()
        }
