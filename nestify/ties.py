"""One tensor under several names: where it lives in a network."""

from torch import nn

from nestify.model_spec import tied_names


def owner(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor, and the tensor's name there."""
    prefix, _, local = name.rpartition(".")
    return network.get_submodule(prefix), local


def tied_across_modules(network: nn.Module) -> dict[str, str]:
    """Tied names that another module holds, one per module: tied name -> kept name."""
    tied: dict[str, str] = {}
    seen: set[tuple[int, str]] = set()
    for alias, name in tied_names(network).items():
        seen.add((id(owner(network, name)[0]), name.rpartition(".")[2]))
        place = (id(owner(network, alias)[0]), alias.rpartition(".")[2])
        if place not in seen:
            tied[alias] = name
            seen.add(place)
    return tied
