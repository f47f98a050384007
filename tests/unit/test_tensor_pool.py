from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensor_pools import HOST

from shared.errors import ConfigurationError, HandleLostError
from shared.slot_memory import MappedSlots
from shared.tensor_bytes import DTYPES, pack_tensor, unpack_tensor
from shared.tensor_pool import TensorPool, TensorReader


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


@pytest.mark.parametrize("fate", ["released", "expired", "reused"])
def test_a_slot_that_goes_while_it_is_copied_is_lost(pool, reader, monkeypatch, fate) -> None:
    handle = publish(pool, torch.ones(4))
    copy_slot = MappedSlots.read

    def copy_and_lose(self, *args) -> torch.Tensor:
        copy = copy_slot(self, *args)
        if fate == "expired":
            assert pool.expire(10) == (handle,)
        else:
            assert pool.release(handle.slot, handle.generation)
        if fate == "reused":
            assert publish(pool, torch.zeros(4)).slot == handle.slot
        return copy

    monkeypatch.setattr(MappedSlots, "read", copy_and_lose)
    with pytest.raises(HandleLostError, match="generation"):
        reader.read(handle)


def test_a_slot_being_written_is_not_yet_there(pool, reader, monkeypatch) -> None:
    old = publish(pool, torch.ones(4))
    assert pool.release(old.slot, old.generation)
    write_slot = MappedSlots.write

    def look_and_write(self, *args) -> None:
        for generation in (old.generation, old.generation + 1):
            with pytest.raises(HandleLostError, match="generation 0"):
                reader.read(replace(old, generation=generation))
        write_slot(self, *args)

    monkeypatch.setattr(MappedSlots, "write", look_and_write)
    new = publish(pool, torch.zeros(4))
    assert torch.equal(reader.read(new), torch.zeros(4))


def test_a_copy_that_began_before_the_publication_is_lost(pool, reader, monkeypatch) -> None:
    old = publish(pool, torch.ones(4))
    assert pool.release(old.slot, old.generation)
    early = replace(old, generation=old.generation + 1)
    copy_slot = MappedSlots.read

    def copy_and_publish(self, *args) -> torch.Tensor:
        copy = copy_slot(self, *args)
        assert publish(pool, torch.zeros(4)) == early
        return copy

    monkeypatch.setattr(MappedSlots, "read", copy_and_publish)
    with pytest.raises(HandleLostError, match="generation 0"):
        reader.read(early)


def test_a_tensor_that_does_not_fit_gives_its_slot_back(pool) -> None:
    for tensor in (torch.ones(4096), torch.ones(4).double(), torch.ones(0)):
        with pytest.raises(ValueError, match=r"fit|travel"):
            publish(pool, tensor)
        assert pool.num_free == pool.num_slots


def test_slots_that_nobody_acquired_are_neither_published_nor_abandoned(pool) -> None:
    handle = publish(pool, torch.ones(4))
    for slot in (handle.slot, 1 - handle.slot):
        with pytest.raises(ValueError, match="not acquired"):
            pool.publish(slot, torch.ones(4), now=0)
        with pytest.raises(ValueError, match="not acquired"):
            pool.abandon(slot)


def test_tensors_of_any_stride_are_published(pool, reader) -> None:
    tensor = torch.arange(64.0).view(8, 8)
    for view in (tensor.T, tensor[::2, 1:3], tensor.to(memory_format=torch.contiguous_format)):
        handle = publish(pool, view)
        assert torch.equal(reader.read(handle), view)
        pool.release(handle.slot, handle.generation)


def test_what_was_read_is_the_readers_own(pool, reader) -> None:
    handle = publish(pool, torch.ones(4))
    reader.read(handle).zero_()
    assert torch.equal(reader.read(handle), torch.ones(4))


def test_a_stale_release_changes_nothing(pool, reader) -> None:
    old = publish(pool, torch.ones(4))
    assert pool.release(old.slot, old.generation)
    new = publish(pool, torch.zeros(4))
    assert new.slot == old.slot
    assert not pool.release(old.slot, old.generation)
    assert torch.equal(reader.read(new), torch.zeros(4))
    assert pool.num_free == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"slot": 2}, "no 16 bytes in slot 2"),
        ({"slot": -1}, "no 16 bytes in slot -1"),
        ({"shape": (2048,)}, "no 8192 bytes in slot"),
        ({"shape": (5,)}, "is not 20 bytes"),
        ({"shape": (-4,)}, "empty dimensions"),
        ({"shape": ()}, "no or empty dimensions"),
        ({"dtype": "float64"}, "unknown dtype"),
        ({"dtype": "float16"}, "is not 8 bytes"),
        ({"generation": 0}, "not 0"),
        ({"host": "elsewhere"}, "another host"),
        ({"owner": "unet-2"}, "no shm of unet-2"),
        ({"pool": "synerdiff-unet-2"}, "No such file"),
        ({"pool": "../synerdiff-unet-1"}, "no pool's name"),
        ({"kind": "cuda_ipc"}, "no cuda_ipc of unet-1"),
        ({"kind": "inline"}, "no inline of unet-1"),
    ],
)
def test_a_handle_that_fits_nothing_is_lost(pool, reader, change, reason) -> None:
    handle = publish(pool, torch.ones(4))
    reader.read(handle)
    with pytest.raises(HandleLostError, match=reason):
        reader.read(replace(handle, **change))


def test_a_closed_pool_is_lost_and_its_mapping_dropped(pool, reader, directory) -> None:
    handle = publish(pool, torch.ones(4))
    reader.read(handle)
    pool.close()
    assert not list(directory.iterdir())
    with pytest.raises(HandleLostError):
        reader.read(handle)
    assert reader.drop_dead() == 0, "the failed read has dropped it already"


def test_a_reader_says_until_when_its_chunks_run(pool, reader) -> None:
    assert not pool.has_chunks_beside(0)
    reader.note_chunks(pool.name, until_ns=1_000)
    assert pool.has_chunks_beside(999)
    assert not pool.has_chunks_beside(1_000)
    pool.close()
    with pytest.raises(HandleLostError):
        reader.note_chunks(pool.name, until_ns=2_000)


def test_a_reader_does_not_end_the_chunks_of_another(pool, directory, monkeypatch) -> None:
    numbers = iter([3, 4])
    monkeypatch.setattr("shared.tensor_reader.secrets.randbelow", lambda _: next(numbers))
    first, second = (TensorReader(host=pool.host, directory=directory) for _ in range(2))
    first.note_chunks(pool.name, until_ns=1_000)
    second.note_chunks(pool.name, until_ns=2_000)
    second.note_chunks(pool.name, until_ns=0)
    assert pool.has_chunks_beside(999)
    first.note_chunks(pool.name, until_ns=0)
    assert not pool.has_chunks_beside(0)


def test_the_running_seq_is_seen_by_readers(pool, reader) -> None:
    assert reader.running_seq(pool.name) == -1
    pool.set_running_seq(41)
    assert reader.running_seq(pool.name) == 41


def test_an_owner_has_one_pool(pool, directory) -> None:
    with pytest.raises(ConfigurationError, match="unet-1"):
        TensorPool("unet-1", num_slots=1, slot_bytes=1, host=HOST, directory=directory)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_inline_copy_is_unpacked_bit_for_bit(dtype) -> None:
    tensor = torch.randn(2, 3, 5).to(DTYPES[dtype]).transpose(0, 2)
    payload = pack_tensor(tensor)
    copy = unpack_tensor(payload, tensor.shape, dtype)
    assert torch.equal(copy, tensor)
    copy.zero_()
    assert torch.equal(unpack_tensor(payload, tensor.shape, dtype), tensor)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((5,), "float32"), ((4,), "float16"), ((), "float32"), ((4,), "int8")]
)
def test_an_inline_copy_of_another_size_is_lost(shape, dtype) -> None:
    with pytest.raises(HandleLostError):
        unpack_tensor(pack_tensor(torch.ones(4)), shape, dtype)


def test_a_dtype_that_latents_never_have_is_not_packed() -> None:
    with pytest.raises(ValueError, match="travel"):
        pack_tensor(torch.ones(4).long())
