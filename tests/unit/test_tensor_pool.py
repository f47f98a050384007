from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.errors import ConfigurationError, HandleLostError
from shared.tensor_pool import TensorPool, TensorReader

HOST = "this-host"


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def pool(directory: Path) -> Iterator[TensorPool]:
    pool = TensorPool(
        "unet-1", num_slots=2, slot_bytes=4096, timeout_s=10, host=HOST, directory=directory
    )
    yield pool
    pool.close()


@pytest.fixture
def reader(directory: Path) -> Iterator[TensorReader]:
    reader = TensorReader(host=HOST, directory=directory)
    yield reader
    reader.close()


def publish(pool: TensorPool, tensor: torch.Tensor, now: float = 0):
    slot = pool.acquire()
    assert slot is not None
    return pool.publish(slot, tensor, now=now)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_published_tensor_is_read_bit_for_bit(pool, reader, dtype) -> None:
    tensor = torch.randn(1, 4, 8, 8, dtype=dtype)
    copy = reader.read(publish(pool, tensor))
    assert copy.dtype == dtype
    assert torch.equal(copy, tensor)


def test_a_full_pool_hands_out_nothing_until_a_slot_is_released(pool) -> None:
    first = publish(pool, torch.ones(4))
    publish(pool, torch.ones(4))
    assert pool.acquire() is None
    assert pool.release(first.slot, first.generation)
    assert pool.acquire() == first.slot


def test_a_released_slot_is_lost_to_its_old_handle(pool, reader) -> None:
    old = publish(pool, torch.ones(4))
    assert torch.equal(reader.read(old), torch.ones(4))
    assert pool.release(old.slot, old.generation)
    with pytest.raises(HandleLostError, match="generation"):
        reader.read(old)
    new = publish(pool, torch.zeros(4))
    assert new.slot == old.slot
    with pytest.raises(HandleLostError, match="generation"):
        reader.read(old)
    assert torch.equal(reader.read(new), torch.zeros(4))


def test_a_stale_release_changes_nothing(pool, reader) -> None:
    old = publish(pool, torch.ones(4))
    assert pool.release(old.slot, old.generation)
    new = publish(pool, torch.zeros(4))
    assert new.slot == old.slot
    assert not pool.release(old.slot, old.generation)
    assert torch.equal(reader.read(new), torch.zeros(4))
    assert pool.num_free == 1


@pytest.mark.parametrize(
    "change",
    [
        {"slot": 2},
        {"slot": -1},
        {"shape": (2048,)},
        {"shape": (5,)},
        {"shape": (-4,)},
        {"shape": ()},
        {"dtype": "float64"},
        {"dtype": "float16"},
        {"generation": 0},
        {"host": "elsewhere"},
        {"owner": "unet-2"},
        {"pool": "synerdiff-unet-2"},
        {"pool": "../synerdiff-unet-1"},
        {"kind": "inline"},
    ],
)
def test_a_handle_that_fits_nothing_is_lost(pool, reader, change) -> None:
    handle = publish(pool, torch.ones(4))
    reader.read(handle)
    with pytest.raises(HandleLostError):
        reader.read(replace(handle, **change))


def test_a_closed_pool_is_lost_and_its_mapping_dropped(pool, reader, directory) -> None:
    handle = publish(pool, torch.ones(4))
    reader.read(handle)
    pool.close()
    assert not list(directory.iterdir())
    with pytest.raises(HandleLostError):
        reader.read(handle)
    assert reader.drop_dead() == 0, "the failed read has dropped it already"


def test_the_running_seq_is_seen_by_readers(pool, reader) -> None:
    assert reader.running_seq(pool.name) == -1
    pool.set_running_seq(41)
    assert reader.running_seq(pool.name) == 41


def test_an_owner_has_one_pool(pool, directory) -> None:
    with pytest.raises(ConfigurationError, match="unet-1"):
        TensorPool("unet-1", num_slots=1, slot_bytes=1, host=HOST, directory=directory)
