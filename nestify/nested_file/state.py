"""What a nested file stores, as tensors: the meeting point of the nested model and the file."""

from dataclasses import dataclass, field

from torch import Tensor

from nestify.nesting import EntryLevels


@dataclass(frozen=True)
class NestedState:
    """The tensors of a nested network, independent of any module.

    Attributes:
        shared: by timm's state-dict name, dense tensors that all levels share (parameters and
            persistent buffers; one name per tied group). A masked-out weight may hold any value in a
            model; after reading a file it is zero where no stored level uses it.
        entry: entry levels of the maskable ones among `shared`.
        private: one dict per level, core first: by state-dict name, tensors that the level owns.
        aliases: tied name -> the name in `shared` that holds the tensor.
        units: name of a maskable tensor -> (rows, cols) of the blocks in which its entry levels are
            constant; absent means (1, 1).
        axes: name of a maskable tensor -> dimension -> uint8 (extent,), the lowest level that has each
            index, n + 1 where no level does; absent means that level 1 has the whole dimension. A level
            uses no weight of which it lacks an index, so no weight enters before all of its indices.
        skipped: per level, core first: names of the blocks that it leaves out; empty if none does.
    """

    shared: dict[str, Tensor]
    entry: EntryLevels
    private: list[dict[str, Tensor]]
    aliases: dict[str, str] = field(default_factory=dict)
    units: dict[str, tuple[int, int]] = field(default_factory=dict)
    axes: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    skipped: list[list[str]] = field(default_factory=list)
