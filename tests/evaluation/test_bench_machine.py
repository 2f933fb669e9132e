"""The machine's name, whatever its system tells."""

import torch

from nestify.evaluation.bench import this_machine


def test_this_machine() -> None:
    found = this_machine(torch.device("cpu"))
    assert found.device == "cpu"
    assert found.device_name == found.cpu
    assert found.torch == torch.__version__
    assert found.cores >= 1
    assert found == this_machine(torch.device("cpu"))
