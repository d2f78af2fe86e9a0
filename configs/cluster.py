"""The description of a SLURM site: what to ask for, what its nodes can reach, and how often a job may start again."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.schema import Count, Positive, Section

Word = Annotated[str, Field(pattern=r"^[^\s]+$")]


class Resources(Section):
    """Options of sbatch. `null` leaves what the job script or a SBATCH_* variable says."""

    partition: Word | None = Field(None, description="sbatch --partition")
    qos: Word | None = Field(None, description="sbatch --qos")
    account: Word | None = Field(None, description="sbatch --account")
    constraint: Word | None = Field(None, description="sbatch --constraint")
    gres: Word | None = Field(None, description="sbatch --gres, for example gpu:a100:1; 'none' asks for no GPU")
    nodes: Positive | None = Field(None, description="sbatch --nodes; more than one for training with compute.parallel alone")
    memory: Word | None = Field(None, description="sbatch --mem, for example 80G")
    cpus: Positive | None = Field(None, description="sbatch --cpus-per-task")
    time: Word | None = Field(None, description="sbatch --time, for example 24:00:00 or 1-00:00:00; quote it in YAML")


class StageResources(Section):
    """What single stages ask for, over `resources`."""

    setup: Resources = Resources()
    monotonicity: Resources = Resources()
    train_baseline: Resources = Resources()
    train_monotonic: Resources = Resources()
    evaluate: Resources = Resources()
    uat: Resources = Resources()
    hotflip: Resources = Resources()
    aggregate: Resources = Resources()


class Cluster(Section):
    """One site."""

    resources: Resources = Field(Resources(), description="of every stage; gres is for the stages whose job script asks for a GPU")
    stages: StageResources = StageResources()
    network: Literal["none", "setup", "all"] = Field(
        "setup",
        description="compute nodes that reach the network: none of them, those of stage 0, all. Without it the cache must be filled",
    )
    signal_seconds: Positive | None = Field(None, description="ask a job to stop so many seconds before its limit; null: as in the script")
    max_restarts: Count = Field(30, description="how often a job that stopped in time queues itself again")
    requeue: bool = Field(True, description="false: the site forbids `scontrol requeue`, and a successor is submitted instead")
    environment: tuple[str, ...] = Field((), description="shell lines before Python starts: `module load ...`, `conda activate ...`")

    def options(self, stage: str, wants_gpu: bool) -> list[str]:
        """Options of sbatch for a stage by name."""
        own: Resources = getattr(self.stages, stage)
        given = {key: mine if (mine := getattr(own, key)) is not None else shared for key, shared in self.resources}
        if not wants_gpu:
            given["gres"] = own.gres
        flags = {"memory": "mem", "cpus": "cpus-per-task"}
        options = [f"--{flags.get(key, key)}={value}" for key, value in given.items() if value is not None]
        return options + ([f"--signal=B:USR1@{self.signal_seconds}"] if self.signal_seconds is not None else [])
