"""What a stack consists of: from the options of `synerdiff up` to its services."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cli.data_folder import DataFolder
from cli.embedded_redis import RedisBinary, choose_maxmemory_bytes, redis_command
from cli.machine import shm_bytes
from cli.supervisor import Service
from shared.errors import ConfigurationError
from shared.host import SHM_DIRECTORY
from shared.model_folder import check_model_folder
from shared.settings import (
    GatewaySettings,
    SchedulerSettings,
    ServiceSettings,
    UnetWorkerSettings,
    VaeWorkerSettings,
    load_settings,
)

EMBEDDED_MODEL: Final = Path(__file__).resolve().parents[1] / "models" / "emoji"
_ALL_INTERFACES: Final = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}  # noqa: S104
_STOP_RANKS: Final = {"gateway": 0, "unet": 1, "vae": 2, "scheduler": 3, "redis": 4}
"""Each is stopped while what it needs to drain is still there."""
GRACE_S: Final = 10.0
"""How long a service may take to stop; it gives up draining a little earlier by itself."""
_MIB: Final = 1 << 20
_NVIDIA_DRIVER: Final = Path("/dev/nvidiactl")

THREAD_WAITING: Final = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}
"""Threads that spin for long stall whoever shares the cores; threads that sleep at once make a slot
of many small operations take twice as long. These spin for some microseconds and then sleep."""

NUM_COMPILED_KERNELS: Final = 8192
COMPILED_KERNEL_BYTES: Final = 40 << 10
COMPILED_KERNELS: Final = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(NUM_COMPILED_KERNELS)}
"""oneDNN compiles an operation for each of its shapes, and slots come with any number of rows, on
different numbers of threads. The 1,024 that it keeps by itself hold a small UNet at some ten of
them; then slots of changing sizes are compiled again and again and take twice as long. One takes up
to some 40 KB, so a worker grows by as much as that while sizes are new to it, and then no more."""

WORKER_ENVIRONMENT: Final = THREAD_WAITING | COMPILED_KERNELS
"""For processes that compute."""


GIVING_WAY: Final = 19
"""Niceness of what does not compute. A forward is spread over all cores, and whoever takes one of
them for a moment stops all: a process that is busy for an eighth of one core's time makes slots a
fifth longer, and none at all if it waits for the moments in which cores are idle, of which there
are enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StackOptions:
    """The options of `synerdiff up`; None leaves a setting to its environment variable or default.

    port: 0 takes any that is free. model: a diffusers folder.
    """

    host: str | None = None
    port: int | None = None
    model: Path | None = None
    device: str | None = None
    dtype: str | None = None
    policy: str | None = None
    unet_workers: int = 1
    vae_workers: int = 1
    log_format: str | None = None
    log_level: str | None = None

    def environment(self) -> dict[str, str]:
        """The SYNERDIFF_* variables that say what was chosen here."""
        chosen = {
            "HOST": self.host,
            "PORT": self.port,
            "MODEL": self.model.resolve() if self.model else None,
            "DEVICE": self.device,
            "DTYPE": self.dtype,
            "POLICY": self.policy,
            "LOG_FORMAT": self.log_format,
            "LOG_LEVEL": self.log_level,
        }
        return {
            f"SYNERDIFF_{name}": str(value) for name, value in chosen.items() if value is not None
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A stack that may be started: its settings are good, its port is free, its model is there.

    environment: of every service, complete but for the address of Redis.
    """

    host: str
    port: int
    model: Path
    policy: str
    unet_workers: tuple[str, ...]
    vae_workers: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    def address(self) -> tuple[str, int]:
        """Where to reach the gateway from this machine."""
        return _ALL_INTERFACES.get(self.host, self.host), self.port

    @property
    def url(self) -> str:
        """The gateway's address for a browser on this machine."""
        host, port = self.address
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def services(self, redis_url: str, metrics_folder: Path) -> list[Service]:
        """The gateway, the scheduler and the workers, in the order in which to start them."""
        environment = dict(self.environment) | {
            "SYNERDIFF_REDIS_URL": redis_url,
            "SYNERDIFF_METRICS_PORT": "0",  # the gateway shows everybody's
            "SYNERDIFF_DRAIN_TIMEOUT_S": str(0.8 * GRACE_S),
            "PROMETHEUS_MULTIPROC_DIR": str(metrics_folder),
            "PYTHONFAULTHANDLER": "1",
            "PYTHONUNBUFFERED": "1",
        }
        return [
            _service("gateway", environment),
            _service("scheduler", environment),
            *(_worker(name, "unet", environment) for name in self.unet_workers),
            *(_worker(name, "vae", environment) for name in self.vae_workers),
        ]


def prepare_stack(options: StackOptions) -> Stack:
    """Check everything that can be checked before anything starts.

    Sets the options' variables in this process's environment, which the services inherit.

    Raises:
        ConfigurationError: A setting is wrong, the model is not there, or the port is taken.
    """
    os.environ.update(options.environment())
    os.environ.setdefault("SYNERDIFF_MODEL", str(EMBEDDED_MODEL))
    gateway = load_settings(GatewaySettings)
    scheduler = load_settings(SchedulerSettings)
    worker = load_settings(UnetWorkerSettings)
    load_settings(VaeWorkerSettings)
    try:
        check_model_folder(worker.model)
    except ConfigurationError as error:
        raise ConfigurationError(f"{error}; --model should name another folder") from error
    _check_shared_memory(worker, options.unet_workers)
    port = reserve_port(gateway.host, gateway.port)
    return Stack(
        host=gateway.host,
        port=port,
        model=worker.model,
        policy=scheduler.policy,
        unet_workers=tuple(f"unet-{i}" for i in range(options.unet_workers)),
        vae_workers=tuple(f"vae-{i}" for i in range(options.vae_workers)),
        environment=dict(os.environ) | {"SYNERDIFF_PORT": str(port)},
    )


def _check_shared_memory(worker: UnetWorkerSettings, num_workers: int) -> None:
    """Raise a ConfigurationError where the UNet workers' pools won't fit; a GPU's lie elsewhere."""
    is_on_gpu = worker.device == "auto" and _NVIDIA_DRIVER.exists()
    if worker.transport == "inline" or worker.device.startswith("cuda") or is_on_gpu:
        return
    needed = num_workers * worker.pool_slots * (worker.pool_slot_kb << 10)
    size = shm_bytes()
    if size is None:
        raise ConfigurationError(
            f"{SHM_DIRECTORY} is not there, where the UNet workers' tensor pools lie; "
            "SYNERDIFF_TRANSPORT=inline does without"
        )
    if size[1] < needed:
        raise ConfigurationError(
            f"{SHM_DIRECTORY} has {size[1] / _MIB:.1f} MiB free, and the UNet workers' tensor "
            f"pools take {needed / _MIB:.1f} MiB: make room, give a container more (--shm-size), "
            "or have fewer or smaller slots (SYNERDIFF_POOL_SLOTS, SYNERDIFF_POOL_SLOT_KB)"
        )


def reserve_port(host: str, port: int) -> int:
    """The port to listen on: `port` if it is free, any free one for 0.

    Raises:
        ConfigurationError: It is taken, or the host is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
            return int(probe.getsockname()[1])
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigurationError(
            f"can't listen on {host}, port {port} ({why}); choose others with --host and --port"
        ) from error


def redis_service(
    binary: RedisBinary,
    *,
    folder: DataFolder,
    socket_path: Path,
    memory_bytes: int,
    lock_descriptor: int,
) -> Service:
    """The embedded server. It holds the folder's lock as long as it lives."""
    return Service(
        name="redis",
        command=redis_command(
            binary,
            data_folder=folder.redis,
            socket=socket_path,
            maxmemory_bytes=choose_maxmemory_bytes(memory_bytes),
        ),
        environment=dict(os.environ) | {"LC_ALL": "C"},  # it does not start with a bad locale
        stop_rank=_STOP_RANKS["redis"],
        death_signal=signal.SIGTERM,
        inherited_fds=(lock_descriptor,),
        final_exit_codes=frozenset({1}),  # it can't read its data or its command line
        niceness=GIVING_WAY,
    )


def limit_image_budget(memory_bytes: int) -> None:
    """Keep stored images within half of the embedded server's memory, unless told otherwise."""
    budget_mb = choose_maxmemory_bytes(memory_bytes) // 2 // _MIB
    default_mb = ServiceSettings.model_fields["image_budget_mb"].default
    os.environ.setdefault("SYNERDIFF_IMAGE_BUDGET_MB", str(min(budget_mb, default_mb)))


def _worker(name: str, kind: str, environment: Mapping[str, str]) -> Service:
    """A compute process."""
    own = {"SYNERDIFF_WORKER_ID": name, **WORKER_ENVIRONMENT}
    return Service(
        name=name,
        command=_command(f"{kind}_worker"),
        environment={**environment, **own},
        stop_rank=_STOP_RANKS[kind],
    )


def _service(name: str, environment: Mapping[str, str]) -> Service:
    """One that does not compute."""
    return Service(
        name=name,
        command=_command(name),
        environment=environment,
        stop_rank=_STOP_RANKS[name],
        niceness=GIVING_WAY,
    )


def _command(package: str) -> tuple[str, ...]:
    """-P: the folder in which `up` was called must not hide our packages."""
    return (sys.executable, "-P", "-m", f"services.{package}")
