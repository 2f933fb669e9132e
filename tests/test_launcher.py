"""What the environment of each launcher says about a process; variables as the launchers document them."""

import pytest

from nestify.errors import RecipeError
from nestify.launcher import Launch, read_launch, rendezvous, without_launcher

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
PMI = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({}, Launch()),
        (TORCHRUN, Launch("torchrun", 5, 8, 1, 4)),
        (SRUN, Launch("srun", 5, 8, 1)),
        (OPEN_MPI, Launch("mpirun", 5, 8, 1, 4)),
        (PMI, Launch("mpiexec", 5, 8, 1, 4)),
        (
            {**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", **TORCHRUN},
            Launch("torchrun", 5, 8, 1, 4),
        ),
        ({**SRUN, **PMI}, Launch("srun", 5, 8, 1)),
        # the script that sbatch starts
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, Launch()),
        # tasks of srun whose step variables were removed, with torch.distributed's own
        (
            {"SLURM_NTASKS": "8", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "MASTER_ADDR": "a"},
            Launch("srun", 3, 8, 3),
        ),
    ],
)
def test_read_launch(environment: dict[str, str], launch: Launch) -> None:
    assert read_launch(environment) == launch


@pytest.mark.parametrize("environment", [{**TORCHRUN, "RANK": "8"}, {**TORCHRUN, "RANK": "x"}])
def test_contradicting_variables(environment: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match="RANK"):
        read_launch(environment)


@pytest.mark.parametrize(
    ("environment", "address"),
    [
        (TORCHRUN, "env://"),
        ({**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "123"}, "tcp://head:123"),
        ({**OPEN_MPI, "MASTER_ADDR": "fe80::1", "MASTER_PORT": "123"}, "tcp://[fe80::1]:123"),
        ({**SRUN, "MASTER_PORT": "123"}, "tcp://gpu07:123"),
        ({**SRUN, "MASTER_PORT": "123", "SLURM_STEP_NODELIST": "a-1,b[2-4]"}, "tcp://a-1:123"),
        ({**SRUN, "MASTER_PORT": "123", "SLURM_STEP_NODELIST": "n[1,3]x,b"}, "tcp://n1x:123"),
        ({**SRUN, "MASTER_PORT": "123", "SLURM_STEP_NUM_NODES": "1"}, "tcp://127.0.0.1:123"),
    ],
)
def test_rendezvous(environment: dict[str, str], address: str) -> None:
    assert rendezvous(read_launch(environment), environment) == address


def test_the_port_depends_on_job_and_step() -> None:
    launch = read_launch(SRUN)
    same, *others = (
        rendezvous(launch, {**SRUN, **change})
        for change in ({"SLURM_PROCID": "6"}, {"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "4712"})
    )
    assert same == rendezvous(launch, SRUN)
    assert len({same, *others}) == 3


def test_an_unknown_host_of_rank_0() -> None:
    with pytest.raises(RecipeError, match="MASTER_ADDR"):
        rendezvous(read_launch(OPEN_MPI), OPEN_MPI)


def test_environment_of_independent_processes() -> None:
    for environment in (TORCHRUN, SRUN, OPEN_MPI, PMI):
        assert read_launch(without_launcher({**environment, "PATH": "/bin"})) == Launch()
    assert without_launcher({**SRUN, "PATH": "/bin"})["PATH"] == "/bin"
