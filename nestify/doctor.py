"""What this machine has of what nestify needs: packages and their versions, extras, devices."""

import importlib
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Literal

from packaging.requirements import Requirement

from nestify import __version__
from nestify.processor import cores, processor_name

SCHEMA_VERSION = 1

State = Literal["ok", "missing", "too old", "broken"]

_OUR_EXTRAS = ("onnx", "tensorboard")
_MODULES = {"torch": "torch", "torchvision": "torchvision", "timm": "timm"}
"""Packages that are imported to see that they work; the others' versions say enough."""


@dataclass(frozen=True)
class Package:
    """One package that nestify needs, or one of its extras does.

    Attributes:
        needs: versions that will do, as in `>=2.6`. `extra`: whose it is; empty: nestify's own.
        version: that is installed; empty where there is none.
        remedy: what helps; empty where nothing is wrong.
    """

    name: str
    needs: str
    extra: str
    version: str
    state: State
    remedy: str = ""


@dataclass(frozen=True)
class Device:
    """Something to compute on: its name for --device, what it is, and its memory, if that is known."""

    name: str
    model: str
    memory_bytes: int | None
    bfloat16: bool


@dataclass(frozen=True)
class Diagnosis:
    """All that was found.

    Attributes:
        environment: settings that change how nestify runs, by name.
    """

    nestify: str
    python: str
    platform: str
    packages: Sequence[Package]
    devices: Sequence[Device]
    environment: dict[str, str]

    @property
    def problems(self) -> list[Package]:
        """Packages without which nestify does not work."""
        return [package for package in self.packages if not package.extra and package.state != "ok"]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values under a schema version."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "works": not self.problems}


def diagnose() -> Diagnosis:
    """Look at packages, extras, devices and settings. Nothing is changed, no network is used."""
    packages = [_package(requirement, extra) for requirement, extra in _requirements()]
    torch_works = all(package.state == "ok" for package in packages if package.name == "torch")
    return Diagnosis(
        nestify=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages=packages,
        devices=_devices() if torch_works else [],
        environment=_environment(),
    )


def _requirements() -> list[tuple[Requirement, str]]:
    """What the installed package says that it needs, and each of its extras for users."""
    try:
        texts = metadata.requires("nestify") or []
    except metadata.PackageNotFoundError:  # run from its source, not installed
        texts = []
    found = [(Requirement(text), "") for text in [*texts, "torchvision"] if "extra ==" not in text]
    for extra in _OUR_EXTRAS:
        found += [
            (Requirement(text), extra)
            for text in texts
            if "extra ==" in text
            and (marker := Requirement(text).marker)
            and marker.evaluate({"extra": extra})
        ]
    return found


def _package(requirement: Requirement, extra: str) -> Package:
    name, needs = requirement.name, str(requirement.specifier)
    install = f"pip install 'nestify[{extra}]'" if extra else f"pip install '{name}{needs}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Package(name, needs, extra, "", "missing", install)
    if not requirement.specifier.contains(version, prereleases=True):
        return Package(name, needs, extra, version, "too old", install)
    if name in _MODULES and (reason := _import_error(_MODULES[name])):
        return Package(name, needs, extra, version, "broken", f"{reason}; install it again")
    return Package(name, needs, extra, version, "ok")


def _import_error(module: str) -> str:
    """Why a module cannot be imported; empty where it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # another package's code may raise anything
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""


def _devices() -> list[Device]:
    """What torch can compute on, as --device names it."""
    import torch

    from nestify.training.precision import Precision

    def bfloat16(name: str) -> bool:
        return Precision(torch.device(name), amp=True).dtype == torch.bfloat16

    threads = torch.get_num_threads()
    model = f"{processor_name()}, {cores()} cores, {threads} thread{'s' * (threads != 1)}"
    devices = [Device("cpu", model, _memory(), bfloat16("cpu"))]
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        name = f"cuda:{number}"
        devices.append(Device(name, facts.name, facts.total_memory, bfloat16(name)))
    if torch.backends.mps.is_available():
        devices.append(Device("mps", platform.machine(), None, bfloat16("mps")))
    return devices


def _memory() -> int | None:
    """Bytes of memory of the machine, where the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _environment() -> dict[str, str]:
    """Settings that change how nestify runs, and the room that there is."""
    names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "NO_COLOR", "COLUMNS")
    found = {name: os.environ[name] for name in names if name in os.environ}
    found["encoding of standard output"] = (sys.stdout and sys.stdout.encoding) or "none"
    found["free in this folder"] = f"{shutil.disk_usage('.').free / 2**30:.1f} GiB"
    return found
