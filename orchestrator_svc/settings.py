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

    launcher: Literal["local", "static", "kubernetes"] = "local"
    """Where jobs get their workers: local starts child processes, static uses the addresses given here, kubernetes
    starts pods."""

    trainer_address: str | None = None
    """Static launcher: address of the trainer, HOST:PORT."""

    inference_addresses: list[str] = Field(default_factory=list)
    """Static launcher: addresses of the inference replicas. A job's orch.client.base_url comes before them."""

    reward_address: str | None = None
    """Static and Kubernetes launcher: address of the reward service. Without it, Kubernetes starts one for each job."""

    worker_wait: float = Field(300.0, gt=0)
    """Static workers: seconds to wait for one that is away before the job fails."""

    namespace: str = "surogate"
    """Kubernetes launcher: namespace of the jobs' pods."""

    kubeconfig: Path | None = None
    """Kubernetes launcher: file that says where the cluster is. Unset is its account as a pod, or the usual file."""

    instance: str = "surogate"
    """Kubernetes launcher: name of this installation, on the labels of all that it makes. Two with stores of their own
    in one namespace need two names."""

    pod_templates: Path = Path("/etc/surogate/pod-templates")
    """Kubernetes launcher: folder of trainer.yaml, inference.yaml and reward.yaml, the pods of each component."""

    worker_addresses: Literal["ip", "dns"] = "ip"
    """Kubernetes launcher: how workers are called: by the pod's address, or by its name, for TLS certificates."""

    gpu_resource: str = "nvidia.com/gpu"
    """Kubernetes launcher: resource that GPUs are counted by."""

    training_jobs: bool = False
    """Make jobs of the TrainingJobs in `namespace`, and tell in them how the jobs are. Needs the extra kubernetes."""

    api_patience: float = Field(300.0, gt=0)
    """Kubernetes launcher: seconds for which calls are tried again while the API server is away."""

    allowed_images: list[str] = Field(default_factory=list)
    """Images, as patterns with *, that jobs may name in cluster.*.image and env[].image. They run with the tokens and
    certificates of the component's template (env[].image: without)."""

    allowed_secrets: list[str] = Field(default_factory=list)
    """Secrets that jobs may read into environment variables: NAME, or NAME/KEY, as patterns with *."""

    allowed_claims: list[str] = Field(default_factory=list)
    """PersistentVolumeClaims that jobs may mount, as patterns with *."""

    allowed_config_maps: list[str] = Field(default_factory=list)
    """ConfigMaps that jobs may mount, as patterns with *."""

    allowed_mount_roots: list[str] = Field(default_factory=lambda: ["/data", "/models", "/outputs"])
    """Folders below which jobs may mount volumes."""

    allowed_queues: list[str] = Field(default_factory=lambda: ["*"])
    """Kueue queues that jobs may wait in, as patterns with *."""

    allowed_priority_classes: list[str] = Field(default_factory=list)
    """PriorityClasses that jobs may take, as patterns with *."""

    allowed_node_labels: list[str] = Field(default_factory=lambda: ["*"])
    """Labels, as patterns with *, by which jobs may choose nodes."""

    allowed_tolerations: list[str] = Field(default_factory=lambda: ["nvidia.com/gpu"])
    """Taints, as patterns with *, that jobs may tolerate."""

    allowed_resources: list[str] = Field(default_factory=lambda: ["nvidia.com/*", "amd.com/gpu", "rdma/*"])
    """Resources of device plugins, as patterns with *, that jobs may ask for beside `gpu_resource`: others may bring in
    devices of the node. CPU, memory and the like need none."""

    output_root: Path | None = None
    """Folder that relative output_dir keys start from; unset is the folder the orchestrator runs in. A job that sets no
    output_dir writes to OUTPUT_ROOT/JOB_ID."""

    restrict_paths: bool | None = None
    """Whether jobs may write under output_root only. Unset means yes if output_root is set."""

    input_roots: list[Path] = Field(default_factory=list)
    """Folders that jobs may read models and data from, as JSON, beside output_root; empty is any."""

    token_variables: list[str] = Field(default_factory=lambda: ["REWARD_*", "*_REWARD_TOKEN"])
    """Names of variables of this process whose values jobs may have sent to the services that they name (token_env),
    with `*` for any characters, as JSON."""

    allowed_urls: list[str] = Field(default_factory=list)
    """Beginnings of the URLs that jobs may name (s3://BUCKET/PREFIX/), as JSON; empty is any that the services may
    use."""

    custom_modules: list[str] = Field(default_factory=list)
    """Python modules whose functions jobs may run in this process (orch.advantage.import_path), submodules included;
    `*` is all, for an orchestrator of one user."""

    rollout_store_bytes: int = Field(4 << 30, ge=0, le=1 << 50)
    """Room for the stored rollouts of a GRPO job, in bytes; its oldest steps are deleted first. 0 stores none."""

    max_running_jobs: int = Field(1, ge=1, le=10_000)
    """Jobs run at once by this orchestrator; more wait in the queue."""

    max_queued_jobs: int = Field(100, ge=1, le=1_000_000)
    """Jobs that may wait; more are refused with RESOURCE_EXHAUSTED."""

    max_replicas: int = Field(64, ge=1, le=1024)
    """Most inference replicas of a job, from the start (infer.dp) or by ScaleJob."""

    max_worker_restarts: int = Field(3, ge=0, le=10_000)
    """Local and Kubernetes launcher: restarts of one worker within ten minutes before its job fails."""

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
