"""What every operator of a graph costs in multiply-accumulates, counted on shapes alone."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from nestify.channels.calls import shape_of
from nestify.channels.trace import Traced


def node_macs(traced: Traced) -> dict[fx.Node, int]:
    """MACs of one image for each node that does any, by torch's own formulas."""
    with _without_onednn(), FakeTensorMode(), FlopCounterMode(display=False) as flops:
        counter = _Counter(traced.graph, flops)
        inputs = [_input(traced, node) for node in traced.graph.find_nodes(op="placeholder")]
        counter.run(*inputs, enable_io_processing=False)
    return counter.macs


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Torch does not look into oneDNN's recurrent kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about other flags, which stay as they are
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def _input(traced: Traced, node: fx.Node) -> Tensor:
    tensor: Tensor = node.meta["val"]
    shape = (1, *tensor.shape[1:]) if node is traced.images else shape_of(tensor)
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)


class _Counter(fx.Interpreter):
    def __init__(self, graph: fx.Graph, flops: FlopCounterMode) -> None:
        super().__init__(nn.Module(), graph=graph)
        self.macs: dict[fx.Node, int] = {}
        self._flops = flops

    def run_node(self, n: fx.Node) -> Any:
        before = self._flops.get_total_flops()
        result = super().run_node(n)
        spent = self._flops.get_total_flops() - before
        if spent:
            self.macs[n] = spent // 2
        return result
