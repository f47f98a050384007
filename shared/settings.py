"""Settings of every service, read once at its start from `SYNERDIFF_*` environment variables.

A bad value stops the start and is named with what it should have been. The lines under the fields
are what `synerdiff settings` and `docs/settings.md` say of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer

from shared.errors import ConfigurationError
from shared.store.records import Retention

PolicyName = Literal["synerdiff", "continuous-parallel"]

_MAX_WAIT_S = 60.0
_WAIT_FRACTION = 0.5

PREFIX = "SYNERDIFF_"
SHIPPED_PROFILES = Path(__file__).resolve().parents[1] / "profiles"


def _form(words: str) -> dict[str, Any]:
    """Return a field's extra schema that says in words what its value has to look like."""
    return {"form": words}


class ServiceSettings(BaseModel):
    """What every service needs."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", validate_default=True, use_attribute_docstrings=True
    )

    redis_url: str = Field(
        "redis://localhost:6379/0",
        pattern=r"^(redis|rediss|unix)://",
        json_schema_extra=_form("an address that begins with redis://, rediss:// or unix://"),
    )
    """The Redis-protocol server, of version 7.0 or newer."""
    log_format: Literal["text", "json"] = "text"
    """How log lines are written: for a person, or for a collector."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Less than this is not logged."""
    metrics_port: int = Field(0, ge=0, le=65535)
    """The port that serves this process's `/metrics` and `/readyz`; 0 serves neither."""
    image_ttl_s: int = Field(3_600, ge=1)
    """How long a picture is kept."""
    record_ttl_s: int = Field(86_400, ge=1)
    """How long the record of a finished request is kept."""
    drain_timeout_s: float = Field(20.0, ge=0)
    """How long work in flight may take once the service has been asked to stop."""
    image_budget_mb: int = Field(1_024, ge=1)
    """Memory for pictures in MiB; beyond it the oldest ones go. They go sooner where the server's
    memory is short."""

    @field_serializer("redis_url")
    def _without_password(self, url: str) -> str:
        """Return the address as it may be logged, without what stands before the host."""
        scheme, _, rest = url.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"

    @property
    def retention(self) -> Retention:
        """Return how long results stay."""
        return Retention(
            image_ttl_s=self.image_ttl_s,
            record_ttl_s=self.record_ttl_s,
            image_budget_bytes=self.image_budget_mb << 20,
        )


class GatewaySettings(ServiceSettings):
    """What a gateway listens on, accepts, and fills in where a request leaves it open."""

    host: str = "127.0.0.1"
    """The address to listen on; empty for all."""
    port: int = Field(8000, ge=0, le=65535)
    """The port to listen on; 0 takes a free one."""
    public_url: str = Field(
        "",
        pattern=r"^(https?://\S*[^\s/])?$",
        json_schema_extra=_form(
            "an address that begins with http:// or https:// and ends without a slash, or empty"
        ),
    )
    """What links to pictures begin with; empty takes it from each request's Host."""
    max_body_kb: int = Field(1_024, ge=1)
    """The largest body of a request in KiB, decompressed."""
    max_open_requests: int = Field(2_000, ge=1)
    """How many pictures may be accepted and not final, whatever the scheduler says of its
    capacity."""
    request_timeout_s: float = Field(600.0, gt=0, allow_inf_nan=False)
    """How long a waiting client waits at most."""
    max_wait_s: float | None = Field(None, ge=0, allow_inf_nan=False)
    """The longest predicted wait for its start with which a request that names no deadline is
    accepted. Left out, half of `REQUEST_TIMEOUT_S`, at most 60."""
    drain_timeout_s: float = Field(60.0, ge=0)
    """How long clients in flight may take once the gateway has been asked to stop."""
    default_model: str = ""
    """The model of requests that name none; empty takes one that is ready."""
    default_steps: int = Field(25, ge=1)
    """The denoising steps of requests that name none."""
    default_guidance_scale: float = Field(5.0, ge=0, le=50)
    """The guidance scale of requests that name none."""
    default_guidance_skip: Literal["off", "balanced", "fast"] = "balanced"
    """How much guidance is skipped in requests that don't say."""
    max_guidance_skip: Literal["off", "balanced", "fast"] = "fast"
    """The most that any request may skip of its guidance, whatever it asks for."""
    default_sampler: str = ""
    """The sampler of requests that name none; empty takes the model's own."""
    max_steps: int = Field(150, ge=1)
    """The most denoising steps that a request may ask for."""
    max_side: int = Field(1_024, ge=8)
    """The longest side of a picture in pixels."""

    @property
    def wait_limit_s(self) -> float:
        """Return `max_wait_s`, or what holds where it is left out."""
        if self.max_wait_s is not None:
            return self.max_wait_s
        return min(_MAX_WAIT_S, _WAIT_FRACTION * self.request_timeout_s)


class SchedulerSettings(ServiceSettings):
    """How the scheduler plans, and when it gives up."""

    policy: PolicyName = "synerdiff"
    """How slots are filled and decodes are placed. Only `synerdiff`
    skips guidance."""
    threshold_first: float = Field(0.8, gt=0, le=1)
    """The share of the UNet's speed that decodes leave it, at first."""
    threshold_min: float = Field(0.2, gt=0, le=1)
    """The lowest that this share may become."""
    max_decode_wait_s: float = Field(3.0, gt=0)
    """A decode that has waited so long is granted, whatever the threshold says."""
    profiles: Path = SHIPPED_PROFILES
    """A profile's file, or a folder of them; none are needed."""
    max_rows: int = Field(0, ge=0)
    """The most rows of a slot; 0 leaves it to the profile."""
    max_attempts: int = Field(5, ge=1)
    """How many attempts a request gets before it fails."""
    recovery_s: float = Field(3.0, gt=0)
    """How long a new scheduler waits for workers to say what they hold."""


class WorkerSettings(ServiceSettings):
    """What both kinds of worker need."""

    worker_id: str = Field(
        "{kind}-{hostname}-{pid}",
        pattern=r"^([\w.-]|\{(kind|hostname|pid)\})+$",
        json_schema_extra=_form(
            "letters, digits, dots, dashes and underlines, with {kind}, {hostname} and {pid} for "
            "what they stand for"
        ),
    )
    """Who a worker is, also once it was restarted."""
    device_group: str = ""
    """Workers of one group share a device; empty means the physical one."""
    model: Path = Path("models/emoji")
    """The folder of the model, in diffusers' layout."""
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        json_schema_extra=_form("auto, cpu, cuda or cuda:N"),
    )
    """What to compute on; auto takes a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What to compute in."""
    threads: int = Field(0, ge=0)
    """Threads on a CPU; 0 takes as many as the process may use."""
    heartbeat_ttl_ms: int = Field(5_000, ge=500)
    """A worker that has not said for so long that it is alive is taken for dead."""
    transport: Literal["auto", "inline"] = "auto"
    """How latents travel; inline sends all of them through Redis."""
    max_call_s: float = Field(60.0, ge=1)
    """A call that takes longer, and much longer than its size accounts for, is taken for stuck, and
    the worker ends to be started again."""
    max_start_s: float = Field(1_800.0, ge=1)
    """The same of its start."""
    warm_up_sizes: str = Field(
        "",
        pattern=r"^(\d+x\d+( \d+x\d+)*)?$",
        json_schema_extra=_form(
            'sizes with spaces between them, as in "256x256 512x768", or empty'
        ),
    )
    """Sizes in pixels, width first, to be ready for beside the model's own; on a CPU, others take
    longer a step."""

    @property
    def sizes_to_warm_up(self) -> tuple[tuple[int, int], ...]:
        """Return each (height, width) in pixels of `warm_up_sizes`."""
        sizes = (size.split("x") for size in self.warm_up_sizes.split())
        return tuple((int(height), int(width)) for width, height in sizes)


class UnetWorkerSettings(WorkerSettings):
    """What a UNet worker holds, and where its latents lie."""

    max_side: int = Field(1_024, ge=8)
    """The longest side of a picture in pixels."""
    max_requests: int = Field(64, ge=1)
    """How many requests are in a worker at once."""
    pool_slots: int = Field(128, ge=1)
    """How many finished latents may wait in shared memory to be decoded."""
    pool_slot_kb: int = Field(256, ge=1)
    """Room for the latents of one picture in KiB."""
    inline_copy_kb: int = Field(4_096, ge=0)
    """The largest latents in KiB of which a copy is left in Redis, from which a picture is decoded
    should the worker die."""
    latents_ttl_s: int = Field(600, ge=1)
    """How long that copy is kept."""
    split_rows: bool = True
    """Whether a CPU's cores share a forward's rows, which is faster, or each operation."""


class VaeWorkerSettings(WorkerSettings):
    """How a VAE worker cuts its decodes."""

    profiles: Path = SHIPPED_PROFILES
    """As the scheduler's; a profile of the model says how its decodes are cut."""
    num_chunks: int | None = Field(None, ge=1, le=64)
    """How many chunks a decode is cut into, whatever the profile says."""
    max_strip_fraction: float | None = Field(None, ge=0, le=1)
    """The largest part of a picture's rows that is decoded at once, whatever the profile says.
    Large pictures need strips where memory is short."""
    max_decodes: int = Field(0, ge=0)
    """How many decodes run side by side, each with feature maps of its own; 0 means one for each
    CPU thread, up to four, and one on a GPU."""


SERVICE_SETTINGS: tuple[type[ServiceSettings], ...] = (
    GatewaySettings,
    SchedulerSettings,
    UnetWorkerSettings,
    VaeWorkerSettings,
)
"""Those that a process is started with."""

S = TypeVar("S", bound=ServiceSettings)


def load_settings(kind: type[S], environment: Mapping[str, str] = os.environ) -> S:
    """Return the settings of one service from environment variables; their case doesn't matter.

    Raises:
        ConfigurationError: Names every variable that is wrong, its value and what it should be.
    """
    by_name = {name.upper(): value for name, value in environment.items()}
    names = {name: f"{PREFIX}{name.upper()}" for name in kind.model_fields}
    chosen = {name: by_name[variable] for name, variable in names.items() if variable in by_name}
    try:
        return kind.model_validate(chosen)
    except ValidationError as error:
        properties = kind.model_json_schema()["properties"]
        lines = [
            f"{names[name]}={issue.get('input')!r} should be {allowed_values(properties[name])}"
            for issue in error.errors()
            for name in [str(issue["loc"][0])]
        ]
        raise ConfigurationError("; ".join(lines)) from error


def to_environment(settings: Mapping[str, object]) -> dict[str, str]:
    """Return the environment variables that give settings these values.

    Raises:
        LookupError: No service has a setting of such a name.
    """
    known = {name for kind in SERVICE_SETTINGS for name in kind.model_fields}
    if unknown := sorted(settings.keys() - known):
        raise LookupError(f"no setting is called {', '.join(unknown)}")
    return {f"{PREFIX}{name.upper()}": str(value) for name, value in settings.items()}


_KINDS = {"integer": "an integer", "number": "a number", "boolean": "true or false"}


def allowed_values(schema: Mapping[str, Any]) -> str:
    """Return in words what a setting may be, by its JSON schema.

    >>> allowed_values({"type": "integer", "minimum": 0, "maximum": 65535})
    'an integer from 0 to 65535'
    """
    if "form" in schema:
        return str(schema["form"])
    options = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    option = options[0]
    if "enum" in option:
        return ", ".join(option["enum"][:-1]) + f" or {option['enum'][-1]}"
    words = _KINDS.get(option.get("type", ""), "text")
    least, most = option.get("minimum"), option.get("maximum")
    above = option.get("exclusiveMinimum")
    if most is not None:
        start = f"above {above} and at most" if least is None else f"from {least} to"
        return f"{words} {start} {most}"
    if least is not None:
        return f"{words} of at least {least}"
    return words if above is None else f"{words} above {above}"


def available_threads() -> int:
    """Return how many CPU threads this process may use, at least 1.

    It is its affinity, cut to the cgroup's quota. torch ignores the quota; a worker with more
    threads than quota is throttled in bursts.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(cores, cgroup_quota(cores)))


def cgroup_quota(cores: int, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the CPUs that a container's quota allows, rounded up; `cores` where there is none."""
    try:
        if (cgroup / "cpu.max").exists():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:  # the first version of cgroups
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text()
        # No quota is "max", or -1 in the first version.
        return -(-int(quota) // int(period)) if int(quota) > 0 else cores
    except (OSError, ValueError):
        return cores
