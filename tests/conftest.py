"""Fixtures and settings shared by all tests: small real timm models, default signal handlers, fixed seeds."""

import gc
import signal
import threading
import warnings
from collections.abc import Callable

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecation warnings while torch is imported by other packages
    import timm
    import torch
    from torch import nn

torch.set_num_threads(1)  # several threads are many times slower if another process is busy


STOP_SIGNALS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGUSR1: signal.SIG_DFL,
    signal.SIGCHLD: signal.SIG_DFL,
    signal.SIGPIPE: signal.SIG_IGN,  # as Python sets it
}


def pytest_configure() -> None:
    """Set the signal handlers of a program at a terminal, whatever the parent process ignores.

    A shell script starts its background jobs with SIGINT ignored. Child processes inherit that, and they
    inherit blocked signals.
    """
    if threading.current_thread() is threading.main_thread():
        for number, handler in STOP_SIGNALS.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def pytest_collection_finish() -> None:
    """Keep what the imports have made out of later garbage collections, which take a second otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., nn.Module]:
    """A function that makes a timm model with random weights and random batch-norm statistics."""

    def make(name: str, **kwargs: object) -> nn.Module:
        model: nn.Module = timm.create_model(name, **{"num_classes": 10, **kwargs})
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert isinstance(module.running_mean, torch.Tensor)
                assert isinstance(module.running_var, torch.Tensor)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                if not module.weight.any():  # else the convolutions before it would have no gradient
                    nn.init.ones_(module.weight)
        return model

    return make
