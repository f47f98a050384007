from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.errors import ConfigurationError, HandleLostError
from shared.tensors import pool_file
from shared.tensors.layout import PoolLayout
from shared.tensors.pool_file import create_pool_file, is_owner_alive, open_pool_file, sweep

LAYOUT = PoolLayout(num_slots=3, slot_bytes=5000)


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def die(owned: pool_file.OwnedPoolFile) -> Path:
    """Leave a file as a killed owner does."""
    fcntl.flock(owned.descriptor, fcntl.LOCK_UN)
    os.close(owned.descriptor)
    return owned.file.path


def test_a_pool_file_has_all_its_memory_and_is_its_users_alone(directory: Path) -> None:
    owned = create_pool_file("unet-1", LAYOUT, host="here", directory=directory)
    status = (directory / "synerdiff-unet-1").stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_size == LAYOUT.file_bytes
    assert status.st_blocks * 512 >= LAYOUT.file_bytes
    owned.close()


def test_slots_lie_apart_from_each_other_and_from_the_header(directory: Path) -> None:
    owned = create_pool_file("unet-1", LAYOUT, host="here", directory=directory)
    for slot in range(LAYOUT.num_slots):
        owned.file.slot_data(slot)[:] = slot + 1
        owned.file.set_generation(slot, 10 + slot)
        owned.file.set_published_bytes(slot, 20 + slot)
    owned.file.companion = "torch_1_2_3"
    reader = open_pool_file("synerdiff-unet-1", host="here", directory=directory)
    for slot in range(LAYOUT.num_slots):
        assert set(reader.slot_data(slot).tolist()) == {slot + 1}
        assert reader.slot_data(slot).size == LAYOUT.slot_bytes
        assert (reader.generation(slot), reader.published_bytes(slot)) == (10 + slot, 20 + slot)
    texts = (reader.host, reader.owner, reader.device, reader.companion, reader.running_seq)
    assert texts == ("here", "unet-1", "cpu", "torch_1_2_3", -1)
    owned.close()


def test_a_reader_can_write_nothing(directory: Path) -> None:
    owned = create_pool_file("unet-1", LAYOUT, host="here", directory=directory)
    reader = open_pool_file("synerdiff-unet-1", host="here", directory=directory)
    with pytest.raises(TypeError):
        reader.running_seq = 1
    with pytest.raises(ValueError, match="read-only"):
        reader.slot_data(0)[0] = 1
    owned.close()


def test_more_than_dev_shm_holds_is_refused_at_once_with_the_sizes() -> None:
    layout = PoolLayout(num_slots=1, slot_bytes=1 << 50)
    with pytest.raises(ConfigurationError, match=r"needs [0-9.]+ MiB in /dev/shm.*64 MiB"):
        create_pool_file("too-large", layout, host="here")
    assert not Path("/dev/shm/synerdiff-too-large").exists()


def test_memory_that_runs_out_halfway_leaves_no_file(directory: Path, monkeypatch) -> None:
    def run_out(*args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", run_out)
    with pytest.raises(ConfigurationError, match="Docker"):
        create_pool_file("unet-1", LAYOUT, host="here", directory=directory)
    assert list(directory.iterdir()) == []


def test_a_pool_that_is_swept_before_it_is_locked_is_made_once_more(
    directory: Path, monkeypatch
) -> None:
    lock = fcntl.flock
    swept: list[tuple[str, ...]] = []

    def sweep_and_lock(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        swept.append(sweep(directory))
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", sweep_and_lock)
    owned = create_pool_file("unet-1", LAYOUT, host="here", directory=directory)
    assert swept == [("synerdiff-unet-1",)]
    assert sweep(directory) == ()
    assert open_pool_file("synerdiff-unet-1", host="here", directory=directory).is_linked()
    owned.close()


@pytest.mark.parametrize("owner", ["", "../x", "a/b", ".hidden", "x" * 129, "ü"])
def test_an_owner_that_makes_no_file_name_is_refused(directory: Path, owner: str) -> None:
    with pytest.raises(ConfigurationError, match="names a file"):
        create_pool_file(owner, LAYOUT, host="here", directory=directory)


def test_a_directory_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Can't create"):
        create_pool_file("unet-1", LAYOUT, host="here", directory=Path("/dev/shm/missing"))


@pytest.mark.parametrize("name", ["other", "synerdiff-", "synerdiff-../unet-1", "synerdiff-gone"])
def test_a_name_of_no_pool_is_lost(directory: Path, name: str) -> None:
    create_pool_file("unet-1", LAYOUT, host="here", directory=directory).close()
    with pytest.raises(HandleLostError):
        open_pool_file(name, host="here", directory=directory)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("half made", "no tensor pool"),
        ("cut", "doesn't fit"),
        ("empty", "none of our pools"),
        ("fifo", "none of our pools"),
        ("renamed", "another owner"),
    ],
)
def test_a_file_that_is_not_whole_and_ours_is_lost(
    directory: Path, damage: str, reason: str
) -> None:
    owned = create_pool_file("unet-1", LAYOUT, host="here", directory=directory)
    whole = owned.file.path.read_bytes()
    owned.close()
    path = directory / "synerdiff-unet-1"
    match damage:
        case "half made":
            path.write_bytes(bytes(8) + whole[8:])
        case "cut":
            path.write_bytes(whole[:-4096])
        case "empty":
            path.write_bytes(b"")
        case "fifo":
            os.mkfifo(path)
            descriptor = os.open(path, os.O_RDWR)  # or opening it would wait for a writer
        case "renamed":
            path = directory / "synerdiff-unet-2"
            path.write_bytes(whole)
    with pytest.raises(HandleLostError, match=reason):
        open_pool_file(path.name, host="here", directory=directory)
    if damage == "fifo":
        os.close(descriptor)


def test_a_link_to_a_pool_is_lost(directory: Path) -> None:
    owned = create_pool_file("unet-1", LAYOUT, host="here", directory=directory)
    (directory / "elsewhere").mkdir()
    (directory / "elsewhere" / "synerdiff-unet-1").symlink_to(owned.file.path)
    with pytest.raises(HandleLostError):
        open_pool_file("synerdiff-unet-1", host="here", directory=directory / "elsewhere")
    owned.close()


def test_a_pool_of_another_host_is_lost(directory: Path) -> None:
    owned = create_pool_file("unet-1", LAYOUT, host="here", directory=directory)
    with pytest.raises(HandleLostError, match="host"):
        open_pool_file(owned.file.path.name, host="there", directory=directory)
    owned.close()


def test_a_sweep_takes_dead_owners_files_and_nothing_else(directory: Path) -> None:
    dead = create_pool_file("dead", LAYOUT, host="here", directory=directory)
    live = create_pool_file("live", LAYOUT, host="here", directory=directory)
    reader = open_pool_file("synerdiff-dead", host="here", directory=directory)
    (directory / "other-file").write_text("")
    (directory / "synerdiff-folder").mkdir()
    (directory / "synerdiff-link").symlink_to(directory / "other-file")
    assert is_owner_alive(dead.file)
    die(dead)
    assert not is_owner_alive(dead.file)
    # The mapping of a dead process goes with it; here it has to go by hand.
    del dead
    assert sweep(directory) == ("synerdiff-dead",)
    left = {path.name for path in directory.iterdir()}
    assert left == {"synerdiff-live", "other-file", "synerdiff-folder", "synerdiff-link"}
    assert not reader.is_linked()
    assert reader.owner == "dead", "what is mapped stays"
    live.close()


def test_a_sweep_leaves_another_users_file(directory: Path, monkeypatch) -> None:
    path = die(create_pool_file("dead", LAYOUT, host="here", directory=directory))
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    assert sweep(directory) == ()
    with pytest.raises(HandleLostError, match="none of our pools"):
        open_pool_file(path.name, host="here", directory=directory)
    monkeypatch.undo()
    assert sweep(directory) == (path.name,)


def test_a_file_named_like_a_pool_but_half_made_is_swept(directory: Path) -> None:
    (directory / "synerdiff-newborn").write_bytes(b"")
    assert sweep(directory) == ("synerdiff-newborn",)


@pytest.mark.parametrize(("companion", "is_taken"), [("torch_7_7_7", True), ("precious", False)])
def test_a_sweep_takes_the_counters_of_a_dead_exporter(
    directory: Path, monkeypatch, companion: str, is_taken: bool
) -> None:
    monkeypatch.setattr(pool_file, "SHM_DIRECTORY", directory)
    (directory / companion).write_text("")
    owned = create_pool_file("dead", LAYOUT, host="here", directory=directory)
    owned.file.companion = companion
    die(owned)
    assert sweep(directory) == ("synerdiff-dead",)
    assert (directory / companion).exists() != is_taken
