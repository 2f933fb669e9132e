"""`nestify doctor`: check which of the packages and devices that nestify uses this machine has."""

import importlib
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from packaging.requirements import Requirement

from nestify.accelerator import gpu_build, gpu_count, list_gpus
from nestify.cli.arguments import AsJson
from nestify.errors import SetupError
from nestify.machine import cores, memory_bytes, processor_name
from nestify.version import __version__

if TYPE_CHECKING:
    from nestify.report.sheet import Sheet


SCHEMA_VERSION = 1

State = Literal["ok", "missing", "too old", "broken"]

_OUR_EXTRAS = ("onnx", "tensorboard")
_MODULES = {"torch": "torch", "torchvision": "torchvision", "timm": "timm"}
"""Modules that are imported to check that they work, by package; for other packages the version is enough."""


CPU_BUILD = "pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu"
"""Installs torch and torchvision without CUDA; on Linux, pip installs them with CUDA by default."""


@dataclass(frozen=True)
class Package:
    """A package that nestify or one of its extras needs.

    Attributes:
        name: name of the package.
        needs: accepted versions, such as `>=2.6`.
        extra: extra that needs the package; empty if nestify itself needs it.
        version: installed version; empty if the package is not installed.
        state: whether the package can be used, and if not, why.
        remedy: what to do about a problem; empty if there is none.
    """

    name: str
    needs: str
    extra: str
    version: str
    state: State
    remedy: str = ""


@dataclass(frozen=True)
class Device:
    """A device that torch can compute on.

    Attributes:
        name: value for --device.
        model: name of the processor or GPU.
        memory_bytes: size of its memory in bytes; None if not known.
        bfloat16: whether mixed precision uses bfloat16 on it.
    """

    name: str
    model: str
    memory_bytes: int | None
    bfloat16: bool


@dataclass(frozen=True)
class Engine:
    """The sparse engine's library.

    Attributes:
        library: path of the library; empty if it cannot be used.
        isa: instruction set that it uses: avx512, avx2 or generic; empty if it cannot be used.
        remedy: what is wrong and how to get it; empty if it can be used.
    """

    library: str = ""
    isa: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Result of `diagnose`.

    Attributes:
        nestify: version of nestify.
        python: version of Python.
        platform: operating system and architecture.
        packages: packages that nestify and its extras need.
        devices: devices that torch can compute on; empty if torch does not work.
        environment: settings that change how nestify runs, by name.
        engine: the sparse engine's library, without which everything else works.
        advice: sentences about what works, but could be better.
    """

    nestify: str
    python: str
    platform: str
    packages: Sequence[Package]
    devices: Sequence[Device]
    environment: dict[str, str]
    engine: Engine
    advice: Sequence[str] = ()

    @property
    def problems(self) -> list[Package]:
        """Packages without which nestify does not work."""
        return [package for package in self.packages if not package.extra and package.state != "ok"]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values with a schema version."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "works": not self.problems}


def diagnose() -> Diagnosis:
    """Check packages, extras, devices and settings, without changing anything and without network access."""
    packages = [_package(requirement, extra) for requirement, extra in _requirements()]
    torch_works = all(package.state == "ok" for package in packages if package.name == "torch")
    return Diagnosis(
        nestify=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages=packages,
        devices=_devices() if torch_works else [],
        environment=_environment(),
        engine=_engine(),
        advice=_advice() if torch_works else [],
    )


def _requirements() -> list[tuple[Requirement, str]]:
    """Return the requirements of the installed package and of its extras for users.

    Returns:
        Pairs of a requirement and its extra, which is empty for nestify itself.
    """
    try:
        texts = metadata.requires("nestify") or []
    except metadata.PackageNotFoundError:  # nestify runs from its source and is not installed
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
    """Check one requirement of nestify or of one of its extras."""
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
    """Return why a module cannot be imported; empty if it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # another package's code may raise anything
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""


def _devices() -> list[Device]:
    """Return the devices that torch can compute on, with their names for --device."""
    import torch

    from nestify.training.precision import Precision

    def bfloat16(name: str) -> bool:
        return Precision(torch.device(name), amp=True).dtype == torch.bfloat16

    threads = torch.get_num_threads()
    model = f"{processor_name()}, {cores()} cores, {threads} thread{'s' * (threads != 1)}"
    devices = [Device("cpu", model, memory_bytes(), bfloat16("cpu"))]
    devices += [Device(gpu.name, gpu.model, gpu.memory, bfloat16(gpu.name)) for gpu in list_gpus()]
    if torch.backends.mps.is_available():
        devices.append(Device("mps", platform.machine(), None, bfloat16("mps")))
    return devices


def _engine() -> Engine:
    """Load the sparse engine's library, as a session does."""
    try:
        from nestify.engine.library import load_library

        library = load_library()
    except SetupError as error:
        return Engine(remedy=str(error))
    except ImportError as error:
        return Engine(remedy=f"it needs the package {error.name or 'numpy'}; pip install numpy")
    return Engine(str(library.path), library.isa)


def _advice() -> list[str]:
    import torch

    return gpu_build_advice(torch.__version__, gpu_build(), gpu_count(), os.environ)


def gpu_build_advice(version: str, kind: str, gpus: int, environment: Mapping[str, str]) -> list[str]:
    """Return advice if torch was built for GPUs, and there is none that it can use.

    Args:
        version: version of torch.
        kind: what torch was built for, CUDA or ROCm; empty for the CPU build.
        gpus: number of GPUs that torch can use.
        environment: environment variables, which may hide GPUs.
    """
    if not kind or gpus:
        return []
    hidden = [name for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES") if name in environment]
    if hidden:
        return [f"torch {version} is the {kind} build, and {hidden[0]} leaves it no GPU"]
    return [
        f"torch {version} is the {kind} build, but finds no GPU here (if there is one, check its driver); "
        "with the CPU build, an environment takes about 1 GB in place of 5.6 GB: in a fresh one, run "
        f"{CPU_BUILD} before you install nestify"
    ]


def _environment() -> dict[str, str]:
    """Return settings that change how nestify runs, and the free disk space, by name."""
    names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "NO_COLOR", "COLUMNS")
    found = {name: os.environ[name] for name in names if name in os.environ}
    found["encoding of standard output"] = (sys.stdout and sys.stdout.encoding) or "none"
    found["free in this folder"] = f"{shutil.disk_usage('.').free / 2**30:.1f} GiB"
    return found


def doctor(
    as_json: AsJson = False,
) -> None:
    """Show versions, devices and missing packages; exit with 3 if nestify cannot work.

    It changes nothing and does not use the network.
    """
    from nestify.cli.output import json_text, write_result
    from nestify.report.text import render

    found = diagnose()
    if as_json:
        write_result(json_text(found.to_dict()), None)
    else:
        title = f"nestify {found.nestify}, Python {found.python}, {found.platform}"
        write_result(render(title, _sheets(found), _notes(found), sys.stdout), None)
    if found.problems:
        names = ", ".join(f"{package.name} ({package.state})" for package in found.problems)
        raise SetupError(f"nestify does not work here: {names}; see the remedies above")


def _sheets(found: "Diagnosis") -> "list[Sheet]":
    from nestify.report.sheet import Column, Sheet
    from nestify.report.table import mebibytes

    packages = found.packages
    return [
        Sheet(
            [
                Column("package", [package.name for package in packages], is_text=True),
                Column("version", [package.version or "-" for package in packages], is_text=True),
                Column("needs", [package.needs or "any" for package in packages], is_text=True, rank=2),
                Column("for", [package.extra or "nestify" for package in packages], is_text=True, rank=1),
                Column("state", [package.state for package in packages], is_text=True),
            ]
        ),
        Sheet(
            [
                Column("device", [device.name for device in found.devices], is_text=True),
                Column("model", [device.model for device in found.devices], is_text=True),
                Column(
                    "memory MiB",
                    ["-" if d.memory_bytes is None else mebibytes(d.memory_bytes) for d in found.devices],
                ),
                Column(
                    "bfloat16", ["yes" if d.bfloat16 else "no" for d in found.devices], is_text=True, rank=1
                ),
            ]
        ),
        Sheet(
            [
                Column("sparse engine", ["not available" if found.engine.remedy else "ok"], is_text=True),
                Column("instruction set", [found.engine.isa or "-"], is_text=True),
                Column("library", [found.engine.library or "-"], is_text=True, rank=1),
            ]
        ),
    ]


def _notes(found: "Diagnosis") -> list[str]:
    remedies = [f"{p.name} ({p.extra or 'nestify'}): {p.remedy}" for p in found.packages if p.remedy]
    if found.engine.remedy:
        remedies.append(f"sparse engine: {found.engine.remedy}")
    return [*remedies, *found.advice, *(f"{name}: {value}" for name, value in found.environment.items())]
