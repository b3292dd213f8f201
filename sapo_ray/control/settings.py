"""What the operator decides: one class, read from the environment (`SAPO_...`) or given by `sapo-ray serve`.

Lists are written with commas, or as JSON: `SAPO_ALLOW_MODELS=builtin:*,/models/*,Qwen/*`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from sapo_ray.errors import ConfigError

Globs = Annotated[list[str], NoDecode]
"""Shell patterns; `*` matches across slashes too, so `/models/*` is everything below /models."""
Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
MEBI = 1 << 20
ACCOUNT_DIR = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where a pod finds its service account."""


class Settings(BaseSettings):
    """The control plane's settings; each is also an environment variable, `SAPO_` before its name in capitals."""

    model_config = SettingsConfigDict(
        env_prefix="SAPO_", extra="ignore", use_attribute_docstrings=True, validate_default=True
    )

    data_dir: Path = Path("sapo-data")
    """Folder for the SQLite file, run directories and data sets; on storage shared with the cluster."""
    database_url: Annotated[str, Field(repr=False)] = ""
    """SQLAlchemy URL, `postgresql+psycopg://...` for replicas; SQLite in data_dir if empty."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8800
    """Port to listen on."""
    control_url: str = ""
    """Where drivers reach this service; http://host:port if empty."""
    ray_jobs_url: str = "http://127.0.0.1:8265"
    """Ray dashboard, whose Jobs API starts the drivers; if it is not set at all, a Ray is started on this machine."""
    ray_auth_token: SecretStr | None = None
    """Token of the cluster at ray_jobs_url, if it runs with Ray's token authentication; from it the tokens of jobs' own
    clusters are derived, which need it."""
    driver_python: str = ""
    """Interpreter that starts drivers on the head node; if empty `python`, for a Ray started here this one."""
    secrets_dir: Path | None = None
    """Secrets by operators, one file each: `<secrets_dir>/<tenant>/<NAME>`; a job gets those it names in `secrets`."""

    admin_key: SecretStr | None = None
    """First admin key; if there is none yet and this is not set, one is made and printed once."""
    operator_tenant: str = "default"
    """Admin keys of this tenant are the operator's: keys of all tenants, /metrics."""

    allow_models: Globs = ["builtin:*"]
    """Which model.path jobs may name: `builtin:*`, Hub ids, absolute folders."""
    allow_data: Globs = ["builtin:*", "dataset:*"]
    """Which data paths jobs may name: `builtin:*`, `dataset:*` (uploads of the tenant), Hub ids, absolute paths."""
    allow_rewards: Globs = []
    """Which verifier.reward (`module:function`) jobs may name; none unless listed: it is code that runs."""
    allow_trust_remote_code: bool = False
    """Whether model.trust_remote_code may be true."""
    allow_mlflow: Globs = []
    """Which logging.mlflow_uri jobs may name."""
    allow_outputs: Globs = []
    """Which output.uri jobs may name: URLs and absolute folders, as `s3://models/*,/outputs/*`; none unless listed."""
    shared_cluster: bool = True
    """Drivers of all tenants run in one cluster, and so trust each other: own code is refused once there are two
    tenants. If false, each job has a RayCluster of its own, made through the Kubernetes API."""
    cluster_template: Path | None = None
    """RayCluster (YAML or JSON) from which jobs' own clusters are made; needed if shared_cluster is false."""
    cluster_deadline_s: Seconds = 1800.0
    """A job whose own cluster has not the nodes that it needs so long after it was made, fails."""
    cluster_keep_s: Annotated[float, Field(ge=0)] = 0.0
    """How long a job's own cluster is kept after its driver's end, for a look at it; it holds its nodes meanwhile."""
    cluster_network_policy: bool = False
    """Whether each job's own cluster has a NetworkPolicy by which its pods reach each other: for a namespace where
    everything is denied that no policy allows."""
    kube_url: str = ""
    """Kubernetes API for jobs' own clusters; if empty, that of the cluster in which the service itself runs."""
    kube_account_dir: Path = ACCOUNT_DIR
    """Folder with `token`, `ca.crt` and `namespace` of the service account; read anew, as the kubelet renews them."""
    kube_namespace: str = ""
    """Namespace of jobs' own clusters; if empty, that of the service account."""
    kube_owner: str = ""
    """Deployment of this service: its jobs' own clusters bear its name, and are deleted with it."""

    max_running_per_tenant: Count = 4
    """Jobs of a tenant that may run at once; others wait in the queue."""
    max_queued_per_tenant: Count = 1000
    """Jobs of a tenant that may wait in the queue; a submission beyond is refused."""
    max_dataset_bytes_per_tenant: Count = 20480 * MEBI
    """What a tenant's data sets may have together; an upload beyond is refused."""
    heartbeat_timeout_s: Seconds = 60.0
    """A driver not heard of for so long is replaced."""
    start_deadline_s: Seconds = 300.0
    """A driver that has not reported so long after its launch is replaced."""
    pause_grace_s: Seconds = 7200.0
    """Time a driver has to finish its step and checkpoint when it is to pause; then it is stopped and the step is lost.
    To be longer than deadlines.step_s and deadlines.checkpoint_s of any job together: those end a driver that hangs."""
    cancel_grace_s: Seconds = 600.0
    """Time a driver has to export when it is cancelled; then it is stopped."""
    lease_s: Seconds = 15.0
    """How long a replica holds a job before it must renew."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """Drivers of a job that may be replaced after a failure."""
    reconcile_interval_s: Seconds = 1.0
    """Pause between two looks at all jobs."""

    max_body_bytes: Count = 2 * MEBI
    """Largest body of an ordinary request."""
    max_link_bytes: Count = 16 * MEBI
    """Largest delivery of a driver."""
    max_upload_bytes: Count = 2048 * MEBI
    """Largest data set."""
    max_row_bytes: Count = 4 * MEBI
    """Longest line of an uploaded JSONL file."""
    rate_per_s: Annotated[float, Field(ge=0)] = 50.0
    """Requests a second of one key, in the long run, on each replica; 0: no limit."""
    rate_burst: Count = 200
    """Requests of one key that may come at once, on each replica."""
    max_streams_per_tenant: Count = 500
    """Event streams a tenant may hold open, on each replica."""
    watch_interval_s: Seconds = 0.25
    """Pause between two looks for new events, while somebody watches."""
    stream_heartbeat_s: Seconds = 15.0
    """A comment goes down an event stream that often."""
    min_free_gb: Annotated[float, Field(ge=0)] = 0.5
    """Free space in data_dir below which uploads are refused, and the service is degraded."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe lines that are logged."""
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Serve /metrics on a port of its own too, without a key; on metrics_host."""
    metrics_host: str = "127.0.0.1"
    """Address of the metrics port."""

    @field_validator("allow_models", "allow_data", "allow_rewards", "allow_mlflow", "allow_outputs", mode="before")
    @classmethod
    def _commas_or_json(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            return json.loads(value)
        return [part.strip() for part in value.split(",") if part.strip()]

    @field_validator("admin_key")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not 24 <= len(value.get_secret_value()) <= 200:
            raise ValueError("must have 24 to 200 characters; make one with `openssl rand -hex 24`")
        return value

    @model_validator(mode="after")
    def _what_follows(self) -> Settings:
        self.data_dir = self.data_dir.expanduser().absolute()
        if not self.database_url:
            self.database_url = f"sqlite:///{self.data_dir / 'control.db'}"
        if not self.control_url:
            host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
            self.control_url = f"http://{host}:{self.port}"
        self.control_url = self.control_url.rstrip("/")
        return self

    @property
    def runs_dir(self) -> Path:
        """Run directories, one per job."""
        return self.data_dir / "runs"

    @property
    def datasets_dir(self) -> Path:
        """Uploaded data sets, a folder per tenant."""
        return self.data_dir / "datasets"

    @property
    def cache_dir(self) -> Path:
        """For what jobs in clusters of their own download, a folder per tenant."""
        return self.data_dir / "cache"

    @property
    def trash_dir(self) -> Path:
        """What is being deleted; emptied at the start."""
        return self.data_dir / "trash"


def load_settings(**over: Any) -> Settings:
    """Settings from the environment with `over` over them.

    Raises:
        ConfigError: a variable has a wrong value; names all of them.
    """
    try:
        return Settings(**over)
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False, include_input=False):
            name = "SAPO_" + str(problem["loc"][0] if problem["loc"] else "").upper()
            lines.append(f"{name}: {problem['msg']}")
        raise ConfigError("the control plane's settings are wrong: " + "; ".join(lines)) from error
