"""The processes of a run as its launcher describes them in the environment: torchrun, srun or mpirun."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from nestify.errors import RecipeError


@dataclass(frozen=True)
class Launch:
    """This process among those that a launcher started.

    Attributes:
        launcher: name of the launcher; "" for a process that was started alone.
        rank: rank of this process, counted from 0.
        size: number of processes.
        local_rank: rank among the processes of this node.
        local_size: number of processes on this node; None if the launcher does not say.
    """

    launcher: str = ""
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int | None = None


@dataclass(frozen=True)
class _Variables:
    """Names of the environment variables of one launcher."""

    launcher: str
    rank: str
    size: str
    local_rank: str
    local_size: str


_TORCHRUN = _Variables("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_SRUN = _Variables("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
_OPEN_MPI = _Variables(
    "mpirun",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
_PMI = _Variables("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
_LAUNCHERS = (_TORCHRUN, _SRUN, _OPEN_MPI, _PMI)

_FIRST_PORT, _PORTS = 20000, 20000


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Return this process's place among the processes that torchrun, srun, mpirun or mpiexec started.

    The first launcher whose variables are set counts, so that torchrun may be started by srun. A batch script
    of SLURM has the number of tasks of its job in SLURM_NTASKS but is a single process; those
    that srun starts have SLURM_STEP_NUM_TASKS too. SLURM_NTASKS counts without it only if the script sets
    MASTER_ADDR, as scripts for torch.distributed do.

    Raises:
        RecipeError: if the variables contradict each other.
    """
    for names in _LAUNCHERS:
        size = environment.get(names.size)
        if size is None and names is _SRUN and "MASTER_ADDR" in environment:
            size = environment.get("SLURM_NTASKS")
        if size is None or names.rank not in environment:
            continue
        launch = Launch(
            names.launcher,
            _number(environment, names.rank),
            int(size) if size.isdecimal() else 0,
            _number(environment, names.local_rank) if names.local_rank in environment else 0,
            _number(environment, names.local_size) if names.local_size in environment else None,
        )
        if launch.rank >= launch.size:
            raise RecipeError(
                f"{names.rank}={launch.rank} does not fit {names.size}={size} in the environment; start the "
                "run with torchrun or srun, or unset both to run a single process"
            )
        return launch
    return Launch()


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not text.isdecimal():
        raise RecipeError(f"{name}={text} in the environment is not a number; unset it to run one process")
    return int(text)


def rendezvous(launch: Launch, environment: Mapping[str, str] = os.environ) -> str:
    """Return the address where the processes meet, for `torch.distributed.init_process_group`.

    MASTER_ADDR and MASTER_PORT come first. Without them, tasks of srun meet on the first node of their step,
    at a port that is derived from the job, and processes of one node meet on it.

    Raises:
        RecipeError: if the launcher does not say where rank 0 runs.
    """
    if launch.launcher == "torchrun":
        return "env://"
    host = environment.get("MASTER_ADDR") or _first_host(launch, environment)
    if host is None:
        raise RecipeError(
            f"{launch.launcher} started {launch.size} processes, and the environment does not say where rank "
            "0 runs; set MASTER_ADDR to its host and MASTER_PORT to a free port in all, or use torchrun"
        )
    port = environment.get("MASTER_PORT")
    if port is None:
        job = environment.get("SLURM_JOB_ID", "")
        number = int(job) if job.isdecimal() else os.getppid()  # processes of one node have the same parent
        step = environment.get("SLURM_STEP_ID", "")
        port = str(_FIRST_PORT + (number + 97 * (int(step) if step.isdecimal() else 0)) % _PORTS)
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _first_host(launch: Launch, environment: Mapping[str, str]) -> str | None:
    """Return the host of rank 0; None if it is not known."""
    if launch.local_size == launch.size:
        return "127.0.0.1"
    if launch.launcher != "srun":
        return None
    if environment.get("SLURM_STEP_NUM_NODES") == "1":
        return "127.0.0.1"
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    # "gpu[07-09,12],cpu3" begins with gpu07
    found = re.match(r"([^\[,\s]+)(?:\[([^\],-]+)[^\]]*\]([^,\s]*))?", hosts)
    return None if found is None else "".join(part or "" for part in found.groups())


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for processes that each work alone, whatever started their parent."""
    names = {name for each in _LAUNCHERS for name in vars(each).values()}
    return {name: value for name, value in environment.items() if name not in names}
