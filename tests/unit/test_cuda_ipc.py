from __future__ import annotations

import ast
import fcntl
import inspect
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tensor_pools import HOST, FakeGpu
from torch.multiprocessing import reductions

from shared.codec import decode_value, encode_value
from shared.errors import ConfigurationError, HandleLostError
from shared.messages import TensorHandle
from shared.tensors import cuda_ipc
from shared.tensors.cuda_exports import CELL_BYTES, NUM_CELLS
from shared.tensors.cuda_ipc import CudaExport, rebuild_arguments, refuse_expandable_segments
from shared.tensors.pool import TensorPool
from shared.tensors.reader import TensorReader

EXPORT = CudaExport(
    storage_handle=bytes(range(66)),
    storage_bytes=1 << 33,
    storage_offset_bytes=1 << 20,
    counter_handle=b"/torch_4194304_4294967295_4294967295",
    counter_offset=9_999,
    event_handle=bytes(range(64)),
    is_event_needed=True,
)


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu()


@pytest.fixture
def pool(directory: Path, gpu: FakeGpu) -> Iterator[TensorPool]:
    pool = TensorPool(
        "unet-1", num_slots=2, slot_bytes=4096, ipc=gpu, host=HOST, directory=directory
    )
    yield pool
    pool.close()


def publish(pool: TensorPool, tensor: torch.Tensor) -> TensorHandle:
    slot = pool.acquire()
    assert slot is not None
    return pool.publish(slot, tensor, now=0)


def assigned_names(function: object, call: str) -> list[str]:
    """The names that the result of `call` is unpacked into, as written in a function's source."""
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        is_call = isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        if is_call and ast.unparse(node.value.func).endswith(call):
            return [element.id for element in node.targets[0].elts]
    raise AssertionError(f"{call} is not called there")


def passed_names(function: object, call: str) -> list[str]:
    """The arguments of `call`, as written in a function's source."""
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(call):
            return [ast.unparse(argument) for argument in node.args]
    raise AssertionError(f"{call} is not called there")


def test_an_export_is_unpacked_as_pytorch_unpacks_it() -> None:
    theirs = assigned_names(reductions.reduce_tensor, "_share_cuda_")
    ours = assigned_names(cuda_ipc.TorchIpc.export, "_share_cuda_")
    assert [name.lstrip("_") for name in ours] == theirs


def test_an_export_is_rebuilt_with_the_arguments_that_pytorch_takes() -> None:
    arguments = rebuild_arguments(EXPORT, 0)
    signature = inspect.signature(reductions.rebuild_cuda_tensor)
    signature.bind(**arguments)
    # A function's parameters can keep their names and change their meaning, but not easily when
    # what it hands on, and what the producer made, keep theirs.
    handed_on = passed_names(reductions.rebuild_cuda_tensor, "_new_shared_cuda")
    made = assigned_names(reductions.reduce_tensor, "_share_cuda_")
    assert handed_on == ["storage_device", "storage_handle", *made[2:]]
    assert made[:2] == ["device", "handle"]
    assert set(handed_on) < set(arguments)


def test_a_counter_is_counted_down_with_the_arguments_that_pytorch_gives() -> None:
    theirs = passed_names(reductions.rebuild_cuda_tensor, "_release_ipc_counter")
    ours = passed_names(cuda_ipc.TorchIpc.discard, "_release_ipc_counter")
    assert theirs == ["ref_counter_handle", "ref_counter_offset"]
    assert ours == ["export.counter_handle", "export.counter_offset"]
    for name in ("_share_cuda_", "_new_shared_cuda", "_release_ipc_counter"):
        assert hasattr(torch.UntypedStorage, name)


def test_an_export_travels_as_primitive_fields_and_fits_its_cell() -> None:
    payload = encode_value(EXPORT)
    assert decode_value(payload, CudaExport) == EXPORT
    assert len(payload) < CELL_BYTES // 2
    assert {field.type for field in fields(CudaExport)} == {"bytes", "int", "bool"}


@pytest.mark.parametrize("variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_expandable_segments_are_refused_by_the_variables_name(variable: str) -> None:
    value = "max_split_size_mb:128, expandable_segments:True"
    with pytest.raises(ConfigurationError, match=f"{variable}=.*expandable_segments"):
        refuse_expandable_segments({variable: value})
    refuse_expandable_segments({variable: "expandable_segments:False"})
    refuse_expandable_segments({variable: "max_split_size_mb:128"})
    refuse_expandable_segments({})


def test_a_gpu_pool_is_read_like_any_other(pool, gpu, directory) -> None:
    reader = TensorReader(ipc=gpu, host=HOST, directory=directory)
    tensor = torch.randn(3, 5).to(torch.bfloat16).T
    handle = publish(pool, tensor)
    assert handle.kind == "cuda_ipc"
    assert torch.equal(reader.read(handle), tensor)
    assert pool.release(handle.slot, handle.generation)
    with pytest.raises(HandleLostError, match="generation"):
        reader.read(handle)


def test_a_consumer_opens_one_export_however_often_it_reads(pool, gpu, directory) -> None:
    reader = TensorReader(ipc=gpu, host=HOST, directory=directory)
    handle = publish(pool, torch.ones(4))
    for _ in range(3):
        reader.read(handle)
    assert gpu.exports.count("opened") == 1


def test_every_consumer_has_an_export_of_its_own_and_more_are_made(pool, gpu, directory) -> None:
    handle = publish(pool, torch.ones(4))

    def consume() -> None:
        TensorReader(ipc=gpu, host=HOST, directory=directory).read(handle)

    for _ in range(NUM_CELLS):
        consume()
    with pytest.raises(HandleLostError, match="no export"):
        consume()
    pool.expire(0)
    consume()
    assert gpu.exports.count("opened") == NUM_CELLS + 1
    assert gpu.exports.count("offered") == NUM_CELLS - 1


def test_a_closed_pool_takes_back_what_nobody_opened(pool, gpu, directory) -> None:
    TensorReader(ipc=gpu, host=HOST, directory=directory).read(publish(pool, torch.ones(4)))
    pool.close()
    assert sorted(gpu.exports) == ["discarded"] * (NUM_CELLS - 1) + ["opened"]


def test_a_pool_that_can_not_be_opened_costs_one_export(pool, directory) -> None:
    gpu = pool._exports._ipc
    gpu.is_openable = False
    reader = TensorReader(ipc=gpu, host=HOST, directory=directory)
    handle = publish(pool, torch.ones(4))
    for _ in range(3):
        with pytest.raises(HandleLostError, match="can't be opened"):
            reader.read(handle)
    assert gpu.exports.count("opened") == 1


@pytest.mark.parametrize("ipc", [None, FakeGpu(device="cuda:another")])
def test_a_consumer_on_another_device_opens_nothing(pool, gpu, directory, ipc) -> None:
    reader = TensorReader(ipc=ipc, host=HOST, directory=directory)
    with pytest.raises(HandleLostError, match="cuda:fake"):
        reader.read(publish(pool, torch.ones(4)))
    assert set(gpu.exports) == {"offered"}
    assert reader.running_seq(pool.name) == -1, "the running seq is for everybody on the host"


def test_a_gpu_pools_memory_is_dropped_when_its_owner_dies(pool, gpu, directory) -> None:
    reader = TensorReader(ipc=gpu, host=HOST, directory=directory)
    handle = publish(pool, torch.ones(4))
    reader.read(handle)
    assert reader.drop_dead() == 0
    fcntl.flock(pool._owned.descriptor, fcntl.LOCK_UN)
    with pytest.raises(HandleLostError, match="dead"):
        reader.read(handle)
    assert reader.drop_dead() == 1
