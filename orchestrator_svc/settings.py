"""Settings of the orchestrator, beside those that every service has."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from surogate.config.service import ServiceSettings


class OrchestratorSettings(ServiceSettings):
    """Runs jobs: keeps them in a store, gives them workers, and answers JobService."""

    model_config = SettingsConfigDict(env_prefix="SUROGATE_ORCHESTRATOR_")

    store_url: str = "sqlite:///surogate-jobs.db"
    """SQLAlchemy URL of the job store: sqlite:///FILE, or postgresql+psycopg://USER@HOST/NAME."""

    launcher: Literal["local", "static"] = "local"
    """Where jobs get their workers: local starts child processes, static uses the addresses given here."""

    trainer_address: str | None = None
    """Static launcher: address of the trainer, HOST:PORT."""

    inference_addresses: list[str] = Field(default_factory=list)
    """Static launcher: addresses of the inference replicas. A job's orch.client.base_url comes before them."""

    reward_address: str | None = None
    """Static launcher: address of the reward service."""

    worker_wait: float = Field(300.0, gt=0)
    """Static launcher: seconds to wait for a worker that is away before the job fails."""

    output_root: Path | None = None
    """Folder that relative output_dir keys start from; unset is the folder the orchestrator runs in. A job that sets no
    output_dir writes to OUTPUT_ROOT/JOB_ID."""

    restrict_paths: bool | None = None
    """Whether jobs may write under output_root only. Unset means yes if output_root is set."""

    custom_modules: list[str] = Field(default_factory=list)
    """Python modules whose functions jobs may run in this process (orch.advantage.import_path), submodules included;
    `*` is all, for an orchestrator of one user."""

    rollout_store_bytes: int = Field(4 << 30, ge=0)
    """Room for the stored rollouts of a GRPO job, in bytes; its oldest steps are deleted first. 0 stores none."""

    max_running_jobs: int = Field(1, ge=1)
    """Jobs run at once by this orchestrator; more wait in the queue."""

    max_queued_jobs: int = Field(100, ge=1)
    """Jobs that may wait; more are refused with RESOURCE_EXHAUSTED."""

    max_worker_restarts: int = Field(3, ge=0)
    """Local launcher: restarts of one worker within ten minutes before its job fails."""

    worker_stop_seconds: float = Field(20.0, gt=0)
    """Local launcher: seconds that a worker may take to end before it is killed."""

    cancel_seconds: float = Field(120.0, gt=0)
    """Seconds that a cancelled job may take to save before its workers are stopped."""

    lease_seconds: float = Field(15.0, gt=0)
    """Seconds after which a job of an orchestrator that is gone is taken over by another on the same store."""

    worker_modules: dict[Literal["trainer", "inference", "reward"], str] = Field(default_factory=dict)
    """Local launcher: Python modules to run in place of trainer_svc, inference_svc or reward_svc, as JSON."""

    @model_validator(mode="after")
    def _static_has_a_trainer(self) -> OrchestratorSettings:
        if self.launcher == "static" and not self.trainer_address:
            raise ValueError("launcher static needs trainer_address")
        if self.restrict_paths and self.output_root is None:
            raise ValueError("restrict_paths needs output_root")
        return self
