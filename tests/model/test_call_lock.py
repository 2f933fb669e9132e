"""Several threads may call one nested model at different levels."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from threading import Thread

import torch
from torch import nn

from nestify.model.call_lock import CallLock
from tests.model.test_nested_model import nest


def test_levels_in_several_threads_are_those_of_one(make_model: Callable[..., nn.Module]) -> None:
    nested = nest(make_model("test_resnet"))
    images = torch.randn(1, 3, 32, 32)
    wrong: list[object] = []
    with torch.no_grad():
        due = {level: nested(images, level) for level in (1, 2, 3)}

    def call(level: int) -> None:
        try:
            with torch.no_grad():
                wrong.extend(level for _ in range(20) if not torch.equal(nested(images, level), due[level]))
        except Exception as error:  # a thread would only print it
            wrong.append(error)

    threads = [Thread(target=call, args=(level,)) for level in due]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_copy_has_a_lock_of_its_own() -> None:
    lock = CallLock()
    for copy in (deepcopy(lock), pickle.loads(pickle.dumps(lock))):
        with lock.held(), copy.held(), copy.held():
            assert copy is not lock
