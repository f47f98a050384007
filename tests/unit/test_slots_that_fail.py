"""A step that fails anywhere is done once all the same, or its request fails: never twice."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from denoising import ATTEMPT, denoise_held, make_denoiser, next_rows, parameters
from torch.utils._python_dispatch import TorchDispatchMode

from services.unet_worker.denoiser import Denoiser, SlotResult
from services.unet_worker.isolation import run_isolated
from services.unet_worker.latents import LatentPool
from shared.messages import ImageParameters

torch.set_num_threads(1)

REQUESTS = {
    "pndm": parameters(seed=1, sampler="PNDMScheduler", num_inference_steps=4),
    "noisy": parameters(seed=2, sampler="euler_a", num_inference_steps=4),
    "own": parameters(seed=3, sampler="UniPCMultistepScheduler", num_inference_steps=4),
    "skips": parameters(seed=4, sampler="ddim", num_inference_steps=6, guidance_skip="fast"),
}
MIXED = ("noisy", "own", "skips")
FAILING_SLOT = 3
"""All of them are still there, and one skips."""


class FailAt(TorchDispatchMode):
    """The operation with that number runs out of memory; counted outside of the UNet."""

    def __init__(self, number: int, error: type[Exception]) -> None:
        super().__init__()
        self.number = number
        self.error = error
        self.has_failed = False
        self.is_counting = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.is_counting and not self.has_failed:
            self.number -= 1
            if self.number < 0:
                self.has_failed = True
                raise self.error("out of memory")
        return func(*args, **(kwargs or {}))


def run(denoiser: Denoiser, *, skip: bool) -> SlotResult:
    return run_isolated(denoiser.run, next_rows(denoiser, skip=skip))


def admit(denoiser: Denoiser, requests: dict[str, ImageParameters]) -> None:
    for name, request in requests.items():
        denoiser.admit(name, ATTEMPT, request)


@pytest.fixture(scope="module")
def denoiser(tiny_model_folder: Path) -> Denoiser:
    return make_denoiser(tiny_model_folder)


@pytest.fixture
def counting(denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FailAt]]:
    """The mode in use, if any: it doesn't count the hundreds of operations of the UNet."""
    modes: list[FailAt] = []
    forward = denoiser._model.forward

    def uncounted(*inputs: torch.Tensor) -> torch.Tensor:
        for mode in modes:
            mode.is_counting = False
        try:
            return forward(*inputs)
        finally:
            for mode in modes:
                mode.is_counting = True

    uncounted.holding_threads = forward.holding_threads  # type: ignore[attr-defined]
    object.__setattr__(denoiser._model, "forward", uncounted)
    yield modes
    object.__setattr__(denoiser._model, "forward", forward)
    for held in denoiser.held():
        denoiser.release(held.request_id)


@pytest.mark.parametrize(("names", "stride"), [(("pndm",), 2), (MIXED, 7)], ids=["alone", "mixed"])
def test_wherever_a_slot_fails_the_latents_are_the_same(
    denoiser: Denoiser, counting: list[FailAt], names: tuple[str, ...], stride: int
) -> None:
    requests = {name: REQUESTS[name] for name in names}
    admit(denoiser, requests)
    expected = denoise_held(denoiser, skip=True)
    for number in itertools.count(step=stride):
        admit(denoiser, requests)
        finished, failed = {}, set()
        has_failed = False
        for slot in itertools.count():
            if not denoiser.held():
                break
            if slot == FAILING_SLOT:
                mode = FailAt(number, RuntimeError)
                counting.append(mode)
                with mode:
                    result = run(denoiser, skip=True)
                counting.clear()
                has_failed = mode.has_failed
            else:
                result = run(denoiser, skip=True)
            for failure in result.failures:
                failed.add(failure.request_id)
                denoiser.release(failure.request_id)
            finished |= {one.request_id: one for one in result.finished}
        assert finished.keys() | failed == requests.keys()
        for name, one in finished.items():
            torch.testing.assert_close(
                one.latents, expected[name].latents, atol=1e-4, rtol=1e-4, msg=f"{name} at {number}"
            )
            assert one.skipped_steps == expected[name].skipped_steps
        if not has_failed:
            assert number > 20  # so many operations there are to fail
            return


def test_what_can_not_be_kept_fails(
    denoiser: Denoiser, counting: list[FailAt], monkeypatch: pytest.MonkeyPatch
) -> None:
    admit(denoiser, {name: REQUESTS[name] for name in MIXED})

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(LatentPool, "apply", fail)
        result = run(denoiser, skip=False)
    assert {one.request_id for one in result.failures} == set(MIXED)
    assert not denoiser.held()


def test_a_pool_that_can_not_grow_holds_what_it_held(
    denoiser: Denoiser, counting: list[FailAt]
) -> None:
    admit(denoiser, REQUESTS)
    expected = denoise_held(denoiser)
    first, last = list(REQUESTS)[:2], list(REQUESTS)[2:]
    for number in itertools.count(step=9):
        admit(denoiser, {name: REQUESTS[name] for name in first})
        mode = FailAt(number, RuntimeError)
        try:
            with mode:
                admit(denoiser, {last[0]: REQUESTS[last[0]]})
        except RuntimeError:
            assert [one.request_id for one in denoiser.held()] == first
        admit(denoiser, {name: REQUESTS[name] for name in last})
        finished = denoise_held(denoiser)
        for name, one in finished.items():
            torch.testing.assert_close(one.latents, expected[name].latents, atol=1e-4, rtol=1e-4)
        if not mode.has_failed:
            return


def test_a_state_that_can_not_be_restored_is_not_held(
    denoiser: Denoiser, counting: list[FailAt]
) -> None:
    admit(denoiser, {"noisy": REQUESTS["noisy"]})
    run(denoiser, skip=False)
    run(denoiser, skip=False)
    state = denoiser.export_state("noisy", ATTEMPT)
    assert state is not None
    expected = denoise_held(denoiser)["noisy"].latents
    for number in itertools.count():
        mode = FailAt(number, RuntimeError)
        try:
            with mode:
                denoiser.import_state(state)
        except RuntimeError:
            assert not denoiser.held()
            continue
        if not mode.has_failed:
            torch.testing.assert_close(
                denoise_held(denoiser)["noisy"].latents, expected, atol=1e-4, rtol=1e-4
            )
            return
