"""The nested file that a run extends: its levels become the first levels of a larger file, unchanged."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nestify.compression.inputs import Inputs
from nestify.data.classes import list_few
from nestify.errors import BadFileError, CheckpointError, DataError, OutputError, RecipeError, foreign_code
from nestify.file.layout import encode_header
from nestify.file.loading import load_nested
from nestify.file.manifest import Description, Extension, LevelDescription
from nestify.file.reader import NestedFile, open_nested_file
from nestify.file.slicing import sliced_header
from nestify.model.entry_levels import NestedState
from nestify.model.level_sizes import derive_level_sizes
from nestify.model.nested_model import NestedModel
from nestify.recipe.levels import Level
from nestify.schedule.blocks import Removable
from nestify.schedule.nest import LevelSize
from nestify.training.observer import Observer


class BaseFile:
    """A nested file to extend, with all of its tensors in memory.

    Args:
        file: the open file, whose levels are loaded and compared with their fingerprints.

    Attributes:
        file: the open file.
        count: number of its levels.
        state: its tensors, on the CPU.

    Raises:
        BadFileError: if the file is damaged, or does not make the model that it names.
    """

    def __init__(self, file: NestedFile) -> None:
        load_nested(file)
        self.file = file
        self.count = file.n_levels
        self.state = file.state()

    @property
    def class_names(self) -> list[str] | None:
        """Names of its classes or labels, in the order of its logits; None if it has none."""
        return self.file.manifest.model.class_names or None

    def identity(self) -> dict[str, str]:
        """Return the file's part of the identity of a run: one hash of all its levels."""
        hashes = "".join(level.sha256 for level in self.file.manifest.levels)
        return {"the hash of the file to extend": hashlib.sha256(hashes.encode()).hexdigest()}

    def check_inputs(self, inputs: Inputs, observer: Observer) -> Inputs:
        """Check that model and images fit the file, and return them with the file's preprocessing.

        Args:
            inputs: the opened inputs of the run.
            observer: notified if the checkpoint is not the one that the file was made from.

        Raises:
            CheckpointError: if the model predicts other classes.
            DataError: if the images have other classes.
            RecipeError: if other validation images would be held out, or the new levels of a backbone would
                return other channels.
        """
        name, manifest = self.file.name, self.file.manifest
        spec, entry = inputs.pretrained.spec, manifest.model
        if spec.output != "logits" and not entry.keep_outputs and any(x.width < 1 for x in manifest.levels):
            raise RecipeError(
                f"the levels of {name} return fewer channels than the original (schedule.keep_outputs = "
                "false), so that levels above them cannot learn from it; nest all levels at once"
            )
        if spec.num_classes != entry.num_classes:
            raise CheckpointError(
                f"the checkpoint predicts {spec.num_classes} classes, {name} {entry.num_classes}; give the "
                "model that the file was made from, after its fine-tuning (finetune.save)"
            )
        self._check_classes(inputs)
        if manifest.held_out != inputs.held_out_record:
            raise RecipeError(
                f"data.holdout and seed = {inputs.recipe.seed} hold out other validation images than those "
                f"of {name}, on which its levels were measured; give the same images, and leave out --seed"
            )
        source = inputs.pretrained.source_sha256
        if manifest.source_sha256 is not None and source != manifest.source_sha256:
            observer.warned(
                f"the checkpoint is not the file that {name} was made from (SHA-256 differs); this is right "
                "only if it is the fine-tuned model that finetune.save wrote"
            )
        spec = replace(spec, preprocessing=entry.preprocessing.model_dump())
        return replace(inputs, pretrained=replace(inputs.pretrained, spec=spec))

    def _check_classes(self, inputs: Inputs) -> None:
        """Check that the images have the file's classes, of which the recipe may give the order.

        Raises:
            DataError: if they do not.
        """
        name, theirs, images = self.file.name, self.class_names, inputs.train_images
        if not theirs or not images.class_names:
            return
        if list(images.class_names) != theirs:
            raise DataError(f"data.class_names has other names than {name}, or another order; leave it out")
        index_of = images.classes.index_of
        if missing := [theirs[k] for k in range(len(theirs)) if index_of is not None and k not in index_of]:
            raise DataError(
                f"{images.source}: has no images of {list_few(missing)}, which {name} predicts; give the "
                "images of the same classes as data.path, or their table as data.labels"
            )

    def sizes(self, levels: Sequence[Level], removable: Removable | None) -> list[LevelSize]:
        """Return the sizes of the file's levels, core first.

        Args:
            levels: the levels of the recipe, of which the first are the file's.
            removable: channels and blocks of the network that can be left out; None if the schedule only
                masks weights.
        """
        own = levels[: self.count]
        if removable is None:
            return [LevelSize(level) for level in own]
        shared, skipped = self.state.shared, self.state.skipped or [[] for _ in own]
        names = {n for n in removable.channels.names if n in shared and shared[n].is_floating_point()}
        with foreign_code(self._unfit):
            found = derive_level_sizes(removable.channels, removable.layers, self.state.axes, names, skipped)
        return [LevelSize(*row) for row in zip(own, found.counts, found.skipped, strict=True)]

    @torch.no_grad()
    def install(self, nested: NestedModel) -> None:
        """Copy the file's weights, entry levels and private tensors into a nested model with more levels.

        Weights that the file does not use keep their values. They do not enter below the new levels.

        Args:
            nested: the nested model, made from the original network.

        Raises:
            BadFileError: if the file's tensors do not fit the model.
        """
        self._check_fit(nested)
        for name, values in self.state.shared.items():
            tensor = nested.shared_tensor(name)
            values = values.to(tensor.device, tensor.dtype)
            held = self._held(name)
            tensor.copy_(values if held is None else torch.where(held.to(tensor.device), values, tensor))
        for name, entry in nested.entry.items():
            own = self.state.entry[name].to(entry.device)
            entry.copy_(torch.where(own <= self.count, own, entry.clamp(min=self.count + 1)))
        for level, tensors in enumerate(self.state.private, start=1):
            for name, tensor in nested.own_tensors(level).items():
                tensor.copy_(tensors[name])

    def merge(self, description: Description, state: NestedState) -> tuple[Description, NestedState]:
        """Return what the writer needs for the larger file.

        The file's levels keep their description, and the rest of the manifest stays that of the file. So a
        slice of the larger file to these levels is the file itself, byte for byte.

        Args:
            description: description of the run, which has made all levels above the file's.
            state: the tensors of all levels.
        """
        manifest = self.file.manifest
        own = [
            LevelDescription(**{name: getattr(level, name) for name in LevelDescription.model_fields})
            for level in manifest.levels
        ]
        first, *others = description.levels[self.count :]
        record = Extension(
            recipe=description.recipe,
            original=description.original,
            versions=description.versions,
            source_sha256=description.source_sha256,
        )
        levels = [*own, first.model_copy(update={"extension": record}), *others]
        kept = {name: getattr(manifest, name) for name in Description.model_fields if name != "levels"}
        private = [
            {name: tensors[name] for name in level.private}
            for level, tensors in zip(manifest.levels, state.private, strict=False)
        ]
        shared = {parameter.name: state.shared[parameter.name] for parameter in manifest.parameters}
        return (
            Description(**{**kept, "levels": levels}),
            replace(state, shared=shared, private=[*private, *state.private[self.count :]]),
        )

    def check_written(self, written: Path) -> None:
        """Check that a slice of the larger file is the file itself.

        Raises:
            OutputError: if it is not.
        """
        larger = open_nested_file(written)
        if sliced_header(larger, self.count) != encode_header(self.file.layout, self.file.manifest):
            raise OutputError(
                f"the levels of {self.file.name} would have changed in the extended file, so it was not "
                "kept; extend it with the version of nestify that wrote it"
            )

    def _held(self, name: str) -> Tensor | None:
        """Return which elements of a shared tensor the file uses; None if it uses all."""
        entry = self.state.entry.tensors.get(name)
        return None if entry is None else entry <= self.count

    def _check_fit(self, nested: NestedModel) -> None:
        """Check names, shapes and structure of the file's tensors.

        Raises:
            BadFileError: naming the first tensor that does not fit.
        """
        made = nested.nested_state()
        if different := self.state.shared.keys() ^ made.shared.keys():
            raise self._unfit(f"tensor {min(different)!r} is in only one of them")
        if different := set(self.state.entry) ^ set(made.entry):
            raise self._unfit(f"tensor {min(different)!r} can be left out in only one of them")
        for name, tensor in self.state.shared.items():
            if tensor.shape != made.shared[name].shape:
                raise self._unfit(f"tensor {name!r} has another shape")
        masked = set(nested.entry)
        for name in self.state.entry:
            own, lowest = self.state.entry[name], made.entry[name]
            used = own <= self.count
            fits = (own >= lowest)[used] if name in masked else (own == lowest)[used | (lowest <= self.count)]
            if not bool(fits.all()):
                raise self._unfit(f"the levels have other parts of tensor {name!r}")
        for level, tensors in enumerate(self.state.private, start=1):
            if {n: t.shape for n, t in tensors.items()} != {
                n: t.shape for n, t in made.private[level - 1].items()
            }:
                raise self._unfit(f"the private tensors of level {level} differ")

    def _unfit(self, reason: str) -> BadFileError:
        return BadFileError(
            f"{self.file.name}: its levels do not fit {self.file.manifest.model.architecture} with this "
            f"recipe ({reason}); extend it with the recipe and the versions of timm and nestify that made it"
        )
