"""Networks that compute the same at first: for the same images, what they share is computed once.

A candidate of `scan` differs from the original network from one layer on. Its passes begin there, with what
the original network has computed before.
"""

from typing import Any

import torch
from torch import Tensor, fx

from nestify.model.batch_norm import GraphStatistics
from nestify.model.graph.memory import is_write


class SharedPrefix:
    """The outputs of an original network's calls for some images, of which networks continue.

    The outputs of one place of the network are in memory at a time. The place moves forward; if a network
    differs from an earlier place on, the original one runs again from the start.

    Args:
        original: a network made by torch.export, in eval mode, that does not change and writes nothing in
            place; see `can_share`.
        images: (B, C, H, W).
        batch_statistics: whether batch norm normalises by the statistics of these images.
    """

    def __init__(self, original: fx.GraphModule, images: Tensor, *, batch_statistics: bool) -> None:
        self._original, self._images = original, images
        self._kind = GraphStatistics if batch_statistics else fx.Interpreter
        self._calls = _calls(original)
        place = {node: number for number, node in enumerate(self._calls)}
        self._last = {
            node: max((place.get(user, len(place)) for user in node.users), default=len(place))
            for node in place
        }
        self._restart()

    @torch.no_grad()
    def run(self, network: fx.GraphModule) -> Any:
        """Return what a network returns for the images."""
        return fx.Interpreter(network).run(self._images, initial_env=self._known(network))

    @torch.no_grad()
    def measure_norms(self, network: fx.GraphModule) -> list[str]:
        """Set a network's running statistics to those of the images, from where it differs from the original.

        Returns:
            Names of the running means and variances that were measured.
        """
        statistics = GraphStatistics(network)
        statistics.add(self._images, self._known(network))
        return statistics.store()

    def _known(self, network: fx.GraphModule) -> dict[fx.Node, Any]:
        """Return the outputs of the calls that a network shares with the original; None if not read."""
        shared = _shared_calls(self._original, network)
        inside, count = set(shared), len(shared)
        pairs = list(zip(self._calls[:count], shared, strict=True))
        read = {node for node, own in pairs if not own.users.keys() <= inside}
        if count < self._done or any(node not in self._run.env for node in read & self._finished):
            self._restart()
        while self._done < count:
            node = self._calls[self._done]
            self._run.env[node] = self._run.run_node(node)
            self._finished.add(node)
            for argument in node.all_input_nodes:
                if self._last.get(argument, count) <= self._done and argument not in read:
                    self._run.env.pop(argument)
            self._done += 1
        return {own: self._run.env.get(node) for node, own in pairs}

    def _restart(self) -> None:
        self._done = 0
        self._finished: set[fx.Node] = set()
        self._run = self._kind(self._original)
        self._run.args_iter = iter([self._images])
        for node in self._original.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self._run.env[node] = self._run.run_node(node)


def can_share(network: fx.GraphModule) -> bool:
    """Whether the outputs of a network's calls stay as they are while it runs."""
    return not any(is_write(node) for node in network.graph.nodes)


def _calls(network: fx.GraphModule) -> list[fx.Node]:
    return [node for node in network.graph.nodes if node.op == "call_function"]


def _shared_calls(original: fx.GraphModule, network: fx.GraphModule) -> list[fx.Node]:
    """Return the first calls of a network that compute what the first calls of the original one do."""
    theirs, ours = (dict(each.state_dict()) for each in (original, network))
    same: dict[str, bool] = {}

    def is_same(name: str) -> bool:
        if name not in same:
            one, other = _tensor(original, theirs, name), _tensor(network, ours, name)
            same[name] = one.shape == other.shape and torch.equal(one, other)
        return same[name]

    shared: list[fx.Node] = []
    places: dict[fx.Node, int] = {}
    for node, own in zip(_calls(original), _calls(network), strict=False):
        arguments = [fx.map_arg((n.args, n.kwargs), lambda a: _key(a, places)) for n in (node, own)]
        if node.target is not own.target or arguments[0] != arguments[1]:
            break
        if not all(is_same(str(a.target)) for a in own.all_input_nodes if a.op == "get_attr"):
            break
        places[node] = places[own] = len(shared)
        shared.append(own)
    return shared


def _key(argument: fx.Node, places: dict[fx.Node, int]) -> str:
    """Return a key of a node that is the same in two graphs: the place of a call, or the name of a tensor."""
    return f"call {places[argument]}" if argument in places else f"{argument.op} {argument.target}"


def _tensor(network: fx.GraphModule, state: dict[str, Tensor], name: str) -> Tensor:
    return state[name] if name in state else network.get_buffer(name)
