"""Who shares what with whom: host and device identities, the transport they allow, and MPS."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from shared.errors import ConfigurationError
from shared.messages import WorkerInfo

Transport = Literal["cuda_ipc", "shm", "inline"]

SHM_DIRECTORY: Final = Path("/dev/shm")  # noqa: S108 (the one place whose files never touch a disk)
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACES: Final = Path("/proc/self/ns")
_NAMESPACE_MARK: Final = "+"
_MPS_FOLDER: Final = "/tmp/nvidia-mps"  # noqa: S108 (CUDA's default)


def host_identity(
    shm_directory: Path = SHM_DIRECTORY, boot_id_file: Path = _BOOT_ID, user_id: int | None = None
) -> str:
    """A text that two processes share exactly when one can open the other's files in /dev/shm.

    Device and inode of the directory tell mounts of one kernel apart (containers that joined one
    IPC namespace, or mount one volume there, have the same; all others differ); the boot id tells
    kernels and their lives apart; the user is in it because the files have mode 0600.

    Raises:
        ConfigurationError: There is no /dev/shm or no /proc, so this is no Linux worth the name.
    """
    try:
        directory = shm_directory.stat()
        boot_id = boot_id_file.read_text(encoding="ascii").strip()
    except OSError as error:
        raise ConfigurationError(
            f"The host has no identity: {error}. Linux with /proc and {shm_directory} is needed."
        ) from error
    user = os.geteuid() if user_id is None else user_id
    return f"{boot_id}.{directory.st_dev:x}-{directory.st_ino:x}.u{user}"


def device_identity(gpu_uuid: str = "", namespaces: Path = _NAMESPACES) -> str:
    """`WorkerInfo.device` of this process: "cpu", or "cuda:UUID+NAMESPACES" for a GPU.

    The namespaces (PID and IPC) are part of it because CUDA IPC needs them to match: equal texts
    mean that one process can open the other's GPU memory. `is_same_device` compares without them.
    """
    if not gpu_uuid:
        return "cpu"
    pid, ipc = (_namespace(namespaces / kind) for kind in ("pid", "ipc"))
    return f"cuda:{gpu_uuid}{_NAMESPACE_MARK}{pid}.{ipc}"


def is_same_device(device: str, other: str) -> bool:
    """Whether two devices of one host are the same silicon, whoever may open whose memory."""
    return device.partition(_NAMESPACE_MARK)[0] == other.partition(_NAMESPACE_MARK)[0]


def has_mps(environment: Mapping[str, str]) -> bool:
    """Whether a CUDA process with this environment becomes a client of an MPS daemon.

    It does if the daemon's socket `control` in CUDA_MPS_PIPE_DIRECTORY can be reached. A daemon
    that was killed leaves the file behind. Asked with a type of socket that the daemon does not
    speak, the kernel tells the two cases apart and the daemon hears nothing.
    """
    folder = environment.get("CUDA_MPS_PIPE_DIRECTORY") or _MPS_FOLDER
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(f"{folder}/control")
        except OSError as error:
            return error.errno == errno.EPROTOTYPE
    return True


def choose_transport(producer: WorkerInfo, consumer: WorkerInfo) -> Transport:
    """The fastest transport that works from one worker to another.

    "cuda_ipc": same host, same GPU, openable. "shm": same host, both on the CPU. "inline": any
    other pair, and a producer without a pool; both others fall back on it. A process can't open
    its own GPU export, so CUDA IPC takes two.
    """
    if not producer.pool or producer.host != consumer.host:
        return "inline"
    if producer.device == consumer.device == "cpu":
        return "shm"
    is_own = producer.incarnation == consumer.incarnation
    if producer.device == consumer.device and producer.device.startswith("cuda:") and not is_own:
        return "cuda_ipc"
    return "inline"


def _namespace(link: Path) -> str:
    try:
        return f"{link.stat().st_ino:x}"
    except OSError as error:
        raise ConfigurationError(f"Can't tell the namespace {link}: {error}.") from error
