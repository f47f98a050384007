"""One contract for all backends: what a forward gives, and what a slot waits for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from denoising import ATTEMPT, next_rows, parameters
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from services.unet_worker.backends.choice import choose_backend
from services.unet_worker.backends.cpu.backend import CpuBackend
from services.unet_worker.backends.cuda import CudaBackend
from services.unet_worker.backends.eager import EagerBackend
from services.unet_worker.backends.protocol import Backend
from services.unet_worker.denoising.denoiser import Denoiser
from services.unet_worker.families.loading import load_family
from services.unet_worker.families.protocol import Family
from shared.errors import ConfigurationError
from shared.messages import SlotShape

pytestmark = pytest.mark.usefixtures("two_threads")

EVEN = SlotShape(threads_beside=1, waiting_share=0.5)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def at_once(call: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """In place of a CUDA graph: the same buffers, filled by the call itself."""
    output = call()
    return lambda: output.copy_(call()), output  # type: ignore[return-value]


class CapturingOnCpu(CudaBackend):
    """The buckets and buffers of the CUDA backend without a GPU, and so without pinned memory."""

    def __init__(self, family: Family) -> None:
        super().__init__(family, max_rows=4, capture=at_once)

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        return EagerBackend.upload(self, tensor)


BACKENDS = [
    pytest.param((EagerBackend, "cpu"), id="eager"),
    pytest.param((CpuBackend, "cpu"), id="cpu"),
    pytest.param((CapturingOnCpu, "cpu"), id="cuda-on-cpu"),
    pytest.param((CudaBackend, "cuda"), id="cuda", marks=[pytest.mark.gpu, needs_gpu]),
]


@pytest.fixture(scope="module", params=BACKENDS)
def served(request: pytest.FixtureRequest, tiny_model_folder: Path) -> tuple[Family, Backend]:
    """A prepared backend and its family."""
    make, device = request.param
    family = load_family(tiny_model_folder, device=device, dtype="float32")
    backend = make(family)
    backend.prepare([(32, 48)])
    return family, backend


def _inputs(family: Family, rows: int, size: tuple[int, int]) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(rows)
    sample = torch.randn(rows, 4, size[0] // 8, size[1] // 8, generator=generator)
    embeds = torch.randn(rows, 16, 32, generator=generator)
    timestep = torch.arange(rows) * 90.0 + 0.5
    return (
        sample.to(family.device),
        timestep.to(family.device),
        {"prompt_embeds": embeds.to(family.device)},
    )


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [(64, 64), (32, 48), (40, 24)])  # the last is not prepared
@torch.inference_mode()
def test_a_prediction_is_the_networks(
    served: tuple[Family, Backend], rows: int, size: tuple[int, int]
) -> None:
    family, backend = served
    inputs = _inputs(family, rows, size)
    expected = family.network(*inputs)
    prediction = backend.predict(*inputs)
    assert prediction.dtype == torch.float32
    assert prediction.is_contiguous()
    assert_close(prediction, expected, atol=1e-3, rtol=1e-3)
    backend.predict(*_inputs(family, rows, size)[:1], *inputs[1:])
    assert_close(prediction, expected, atol=1e-3, rtol=1e-3)  # it is the caller's own


@torch.inference_mode()
def test_a_row_says_nothing_of_its_neighbours(served: tuple[Family, Backend]) -> None:
    family, backend = served
    sample, timestep, conditions = _inputs(family, 3, (64, 64))
    together = backend.predict(sample, timestep, conditions)
    alone = torch.cat(
        [
            backend.predict(
                sample[i : i + 1],
                timestep[i : i + 1],
                {name: values[i : i + 1] for name, values in conditions.items()},
            )
            for i in range(3)
        ]
    )
    assert_close(alone, together, atol=1e-3, rtol=1e-3)
    if backend.is_batch_invariant:
        assert torch.equal(alone, together)


def test_a_size_that_can_not_be_generated_is_refused(served: tuple[Family, Backend]) -> None:
    _, backend = served
    with pytest.raises(ConfigurationError, match="60x64"):
        backend.prepare([(64, 60)])


@torch.inference_mode()
def test_what_goes_to_the_device_comes_back(served: tuple[Family, Backend]) -> None:
    family, backend = served
    values = torch.arange(5.0)
    uploaded = backend.upload(values)
    assert uploaded.device.type == family.device.type
    assert backend.fetch(uploaded) == values.tolist()
    with backend.serving_slot(), backend.handing_over():
        assert backend.run(lambda: 3, threads=2, shape=EVEN) == 3
    backend.finish()
    assert torch.get_num_threads() == 2


def test_each_device_has_its_backend(tiny_model_folder: Path) -> None:
    family = load_family(tiny_model_folder, device="cpu", dtype="float32")
    assert isinstance(choose_backend(family), CpuBackend)


# --- what a slot does with a GPU, without one ----------------------------------------------------

GPU = torch.device("meta")
"""Stands for one: its tensors have no values, so that whoever waits for one fails, and no operation
takes them together with the host's."""


class Traffic(TorchDispatchMode):
    """Notes what passes between the host and the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self._pinned: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name()
        if name in ("aten::pin_memory", "aten::_pin_memory"):
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        if name.startswith(("aten::to.", "aten::_to_copy")):
            result = func(*args, **kwargs)
            if _crosses(args[0].device, result.device):
                is_pinned = any(args[0] is tensor for tensor in self._pinned)
                is_asked = kwargs.get("non_blocking") or any(arg is True for arg in args)
                self.events.append("pinned copy" if is_pinned and is_asked else "blocking copy")
            return result
        if name.startswith("aten::copy_") and _crosses(args[1].device, args[0].device):
            self.events.append("blocking copy")
        return func(*args, **kwargs)


def _crosses(source: torch.device, target: torch.device) -> bool:
    return source.type != target.type


class WatchedBackend(CudaBackend):
    """Notes when forwards are launched and the host waits for what they made."""

    events: list[str]

    def predict(self, *inputs: Any) -> torch.Tensor:
        self.events.append("forward")
        return super().predict(*inputs)

    def fetch(self, tensor: torch.Tensor) -> list[float]:
        self.events.append("wait")
        return [1.0] * len(tensor)


@pytest.fixture
def traffic(tiny_model_folder: Path) -> tuple[Traffic, Denoiser]:
    """A denoiser on a GPU that does not exist: values are shapes, and devices are checked."""
    family: Any = load_family(tiny_model_folder, device="cpu", dtype="float32")
    denoiser: Any = Denoiser(family, EagerBackend(family))
    requests = [
        parameters(sampler="ddim", guidance_skip="balanced"),
        parameters(sampler="euler_a", prompt="sun"),
        parameters(sampler="dpmpp_2m", guidance_scale=1.0),
    ]
    for request in requests:  # numbers that are read off, ahead of the world without numbers
        denoiser.samplers.table(request.sampler, request.num_inference_steps)
        family.encode(request)
    family.network.to(GPU)
    family.device = GPU
    watch = Traffic()
    backend = WatchedBackend(family, max_rows=8, capture=at_once)
    backend.events = watch.events
    backend.prepare()
    denoiser._backend = backend
    for number, request in enumerate(requests):
        denoiser.admit(str(number), ATTEMPT, request)
    return watch, denoiser


def test_a_slot_uploads_from_pinned_memory_ahead_of_its_forward_and_waits_once(
    traffic: tuple[Traffic, Denoiser],
) -> None:
    watch, denoiser = traffic
    for _ in range(4):
        watch.events.clear()
        with watch:
            result = denoiser.run(next_rows(denoiser, skip=True))
        assert not result.failures
        forward = watch.events.index("forward")
        assert set(watch.events[:forward]) == {"pinned copy"}
        assert watch.events[forward:] == ["forward", "wait"]
