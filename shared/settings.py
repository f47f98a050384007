"""Settings of every service, read once at its start from `SYNERDIFF_*` environment variables.

A bad value stops the start and is named with what it should have been.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_serializer
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.errors import ConfigurationError
from shared.records import Retention

PolicyName = Literal[
    "static",
    "dynamic",
    "continuous-serial",
    "continuous-parallel",
    "static-with-skip",
    "dynamic-with-skip",
    "continuous-serial-with-skip",
    "continuous-parallel-with-skip",
    "continuous-parallel-naive",
    "synerdiff",
    "synerdiff-without-chunking",
    "synerdiff-without-skip",
    "synerdiff-without-planning",
    "synerdiff-without-feedback",
]

_MAX_WAIT_S = 60.0
_WAIT_FRACTION = 0.5

SHIPPED_PROFILES = Path(__file__).resolve().parents[1] / "profiles"


class ServiceSettings(BaseSettings):
    """What every service needs. metrics_port: 0 serves no metrics of its own.

    drain_timeout_s: how long work in flight may take once a service is asked to stop.
    """

    model_config = SettingsConfigDict(env_prefix="SYNERDIFF_", frozen=True, extra="ignore")

    redis_url: str = Field(
        "redis://localhost:6379/0",
        pattern=r"^(redis|rediss|unix)://",
        description="an address that begins with redis://, rediss:// or unix://",
    )
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    metrics_port: int = Field(0, ge=0, le=65535)
    image_ttl_s: int = Field(3_600, ge=1)
    record_ttl_s: int = Field(86_400, ge=1)
    drain_timeout_s: float = Field(20.0, ge=0)
    image_budget_mb: int = Field(1_024, ge=1)

    @field_serializer("redis_url")
    def _without_password(self, url: str) -> str:
        """For the log: all of it but what stands before the host."""
        scheme, _, rest = url.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"

    @property
    def retention(self) -> Retention:
        """How long results stay."""
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
    """0 for a free one."""
    public_url: str = Field(
        "",
        pattern=r"^(https?://\S*[^\s/])?$",
        description="an address that begins with http:// or https:// and ends without a slash, "
        "or empty",
    )
    """What links to pictures begin with; empty takes it from each request's Host."""
    max_body_kb: int = Field(1_024, ge=1)
    """Of a request's body, decompressed."""
    max_open_requests: int = Field(2_000, ge=1)
    """Images accepted and not final, whatever the scheduler says of its capacity."""
    request_timeout_s: float = Field(600.0, gt=0, allow_inf_nan=False)
    """How long a waiting client waits at most."""
    max_wait_s: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Until the predicted start of a request that names no deadline; above it requests are refused.
    Left out, half of `request_timeout_s`, at most 60."""
    drain_timeout_s: float = Field(60.0, ge=0)
    default_model: str = ""
    """Of requests that name none; empty takes one that is ready."""
    default_steps: int = Field(25, ge=1)
    default_guidance_scale: float = Field(5.0, ge=0, le=50)
    default_guidance_skip: Literal["off", "balanced", "fast"] = "balanced"
    max_guidance_skip: Literal["off", "balanced", "fast"] = "fast"
    """The most that any request may skip of its guidance, whatever it asks for."""
    default_sampler: str = ""
    max_steps: int = Field(150, ge=1)
    max_side: int = Field(1_024, ge=8)

    @property
    def wait_limit_s(self) -> float:
        """Return `max_wait_s`, or what holds where it is left out."""
        if self.max_wait_s is not None:
            return self.max_wait_s
        return min(_MAX_WAIT_S, _WAIT_FRACTION * self.request_timeout_s)


class SchedulerSettings(ServiceSettings):
    """max_rows: cap on a slot, 0 leaves it to the profile. max_attempts: before giving up.

    policy: guidance is skipped by synerdiff, and by the others `with-skip`. profiles: a profile's
    file, or a folder of them; none are needed. threshold_*: where the threshold begins and how low
    it may go. max_decode_wait_s: a decode that has waited so long is granted whatever the threshold
    says.
    """

    policy: PolicyName = "synerdiff"
    threshold_first: float = Field(0.8, gt=0, le=1)
    threshold_min: float = Field(0.2, gt=0, le=1)
    max_decode_wait_s: float = Field(3.0, gt=0)
    profiles: Path = SHIPPED_PROFILES
    max_rows: int = Field(0, ge=0)
    max_attempts: int = Field(5, ge=1)
    recovery_s: float = Field(3.0, gt=0)


class WorkerSettings(ServiceSettings):
    """What both kinds of worker need.

    worker_id: who a restarted worker is; may hold {kind}, {hostname} and {pid}. device_group: empty
    means the physical device. threads: 0 means as many as the process may use. warm_up_sizes: sizes
    to be ready for beside the model's own, as in "256x256 512x768" (width first, in pixels); on a
    CPU, others take longer a step. max_call_s: what takes longer, and much longer than its size
    accounts for, is taken for stuck, and the worker ends to be started again. max_start_s: likewise
    of its start.
    """

    worker_id: str = Field(
        "{kind}-{hostname}-{pid}",
        pattern=r"^([\w.-]|\{(kind|hostname|pid)\})+$",
        description="letters, digits, dots, dashes and underlines, with {kind}, {hostname} and "
        "{pid} for what they stand for",
    )
    device_group: str = ""
    model: Path = Path("models/emoji")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int = Field(0, ge=0)
    heartbeat_ttl_ms: int = Field(5_000, ge=500)
    transport: Literal["auto", "inline"] = "auto"
    max_call_s: float = Field(60.0, ge=1)
    max_start_s: float = Field(1_800.0, ge=1)
    warm_up_sizes: str = Field(
        "",
        pattern=r"^(\d+x\d+( \d+x\d+)*)?$",
        description='sizes with spaces between them, as in "256x256 512x768", or empty',
    )

    @property
    def sizes_to_warm_up(self) -> tuple[tuple[int, int], ...]:
        """Each (height, width) in pixels of `warm_up_sizes`."""
        sizes = (size.split("x") for size in self.warm_up_sizes.split())
        return tuple((int(height), int(width)) for width, height in sizes)


class UnetWorkerSettings(WorkerSettings):
    """max_requests: resident at once. pool_slots: finished latents waiting to be decoded.

    split_rows: whether a CPU's cores share a forward's rows, which is faster, or each operation.
    """

    max_side: int = Field(1_024, ge=8)
    max_requests: int = Field(64, ge=1)
    pool_slots: int = Field(128, ge=1)
    pool_slot_kb: int = Field(256, ge=1)
    inline_copy_kb: int = Field(4_096, ge=0)
    latents_ttl_s: int = Field(600, ge=1)
    split_rows: bool = True


class VaeWorkerSettings(WorkerSettings):
    """profiles: as the scheduler's. A profile of the model says how its decodes are cut.

    num_chunks, max_strip_fraction: override it, as in `ChunkGranularity`. Large pictures need
    strips where memory is short.
    """

    profiles: Path = SHIPPED_PROFILES
    num_chunks: int | None = Field(None, ge=1, le=64)
    max_strip_fraction: float | None = Field(None, ge=0, le=1)


S = TypeVar("S", bound=ServiceSettings)


def load_settings(kind: type[S]) -> S:
    """The settings of one service from the environment.

    Raises:
        ConfigurationError: Names every variable that is wrong, its value and what it should be.
    """
    try:
        return kind()
    except ValidationError as error:
        properties = kind.model_json_schema()["properties"]
        lines = [
            f"SYNERDIFF_{name.upper()}={issue.get('input')!r} should be "
            f"{_describe(properties[name])}"
            for issue in error.errors()
            for name in [str(issue["loc"][0]).lower()]
        ]
        raise ConfigurationError("; ".join(lines)) from error


_KINDS = {"integer": "an integer", "number": "a number", "boolean": "true or false"}


def _describe(schema: Mapping[str, Any]) -> str:
    """Return in words what a setting may be.

    >>> _describe({"type": "integer", "minimum": 0, "maximum": 65535})
    'an integer from 0 to 65535'
    """
    if "description" in schema:
        return str(schema["description"])
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
    """CPU threads this process may use: its affinity, cut to the cgroup's quota, at least 1.

    torch ignores the quota; a worker with more threads than quota is throttled in bursts.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(cores, cgroup_quota(cores)))


def cgroup_quota(cores: int, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that this container's quota allows, rounded up; `cores` where there is no quota."""
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
