"""The denoiser's contract: which rows run, what is reported, who fails, what can move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from denoising import (
    ATTEMPT,
    denoise_alone,
    denoise_held,
    make_denoiser,
    next_rows,
    parameters,
)

from services.unet_worker import slot
from services.unet_worker.denoiser import Denoiser
from services.unet_worker.guidance import GuidanceRecord, extrapolation_weights
from services.unet_worker.model import load_model
from services.unet_worker.samplers import SAMPLERS
from shared.errors import ConfigurationError, InvalidRequestError, OverloadedError, ProtocolError
from shared.guidance_skip import SKIP_LEVELS, SkipParameters
from shared.messages import SlotRow

torch.set_num_threads(1)

SMALL: dict[str, Any] = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def shared_denoiser(tiny_model_folder: Path) -> Denoiser:
    return make_denoiser(tiny_model_folder, max_requests=16, max_side=128)


@pytest.fixture
def denoiser(shared_denoiser: Denoiser) -> Denoiser:
    """A denoiser that holds nothing."""
    for held in shared_denoiser.held():
        shared_denoiser.release(held.request_id)
    return shared_denoiser


@pytest.fixture(scope="module")
def other_denoiser(shared_denoiser: Denoiser) -> Denoiser:
    return Denoiser(shared_denoiser._model, max_steps=20)


def _row(
    request_id: str, step_index: int, attempt: str = ATTEMPT, *, skip: bool = False
) -> SlotRow:
    return SlotRow(request_id=request_id, attempt=attempt, step_index=step_index, skip=skip)


def _run_steps(denoiser: Denoiser, request_id: str, num_steps: int) -> None:
    for _ in range(num_steps):
        denoiser.run(next_rows(denoiser, [request_id]))


def _psnr(latents: torch.Tensor, expected: torch.Tensor) -> float:
    error = (latents - expected).pow(2).mean()
    return float(10 * torch.log10((expected.max() - expected.min()) ** 2 / error))


# --- which rows run ------------------------------------------------------------------------------


def test_a_row_runs_only_at_the_step_its_attempt_holds(denoiser: Denoiser) -> None:
    denoiser.admit("a", ATTEMPT, parameters(**SMALL))
    denoiser.admit("b", ATTEMPT, parameters(**SMALL))
    asked = [
        _row("a", 5),
        _row("a", 0, "0-9"),
        _row("nobody", 0),
        _row("a", 0),
        _row("a", 0),
        _row("b", 0),
    ]
    result = denoiser.run(asked)
    assert [row.has_run for row in result.rows] == [False, False, False, True, False, True]
    assert [row.next_step_index for row in result.rows] == [1, -1, -1, 1, 1, 1]
    assert result.num_unet_rows == 4
    assert not denoiser.run(asked).num_unet_rows
    assert [held.step_index for held in denoiser.held()] == [1, 1]


def test_an_empty_slot_is_no_slot(denoiser: Denoiser) -> None:
    result = denoiser.run([])
    assert (result.rows, result.finished, result.num_unet_rows) == ((), (), 0)


def test_rows_of_another_batch_key_wait(denoiser: Denoiser) -> None:
    denoiser.admit("a", ATTEMPT, parameters(height=32, width=48))
    denoiser.admit("b", ATTEMPT, parameters(height=48, width=32))
    result = denoiser.run([_row("a", 0), _row("b", 0)])
    assert [row.has_run for row in result.rows] == [True, False]
    assert result.rows[1].next_step_index == 0


def test_unguided_rows_cost_one_unet_row_and_guided_ones_two(denoiser: Denoiser) -> None:
    for i, guidance_scale in enumerate((0.0, 1.0, 1.01, 7.0)):
        changes = SMALL | {"guidance_scale": guidance_scale}
        admission = denoiser.admit(f"r{i}", ATTEMPT, parameters(**changes))
        assert admission.is_guided == (guidance_scale > 1)
    assert denoiser.run(next_rows(denoiser)).num_unet_rows == 6


def test_the_same_attempt_admitted_twice_goes_on_and_another_one_starts_again(
    denoiser: Denoiser,
) -> None:
    first = denoiser.admit("a", "1-1", parameters(**SMALL))
    _run_steps(denoiser, "a", 2)
    assert denoiser.admit("a", "1-1", parameters(**SMALL)) == first
    assert denoiser.held()[0].step_index == 2
    denoiser.admit("a", "1-2", parameters(**SMALL))
    assert [(held.attempt, held.step_index) for held in denoiser.held()] == [("1-2", 0)]


def test_released_requests_are_gone_and_their_neighbours_go_on(denoiser: Denoiser) -> None:
    expected = denoise_alone(denoiser, parameters(seed=2, **SMALL)).latents
    denoiser.admit("a", ATTEMPT, parameters(seed=1, **SMALL))
    denoiser.admit("b", ATTEMPT, parameters(seed=2, **SMALL))
    denoiser.run(next_rows(denoiser))
    assert denoiser.release("a", ATTEMPT)
    torch.testing.assert_close(denoise_held(denoiser)["b"].latents, expected, rtol=1e-4, atol=1e-4)
    assert not denoiser.held()


def test_finished_latents_are_the_callers_own(denoiser: Denoiser) -> None:
    denoiser.admit("a", ATTEMPT, parameters(**SMALL))
    finished = denoise_held(denoiser)["a"]
    assert finished.latents.shape == (1, 4, 4, 4)
    assert finished.latents.is_contiguous()
    assert finished.latents.dtype == torch.float32
    kept = finished.latents.clone()
    denoise_alone(denoiser, parameters(seed=9, **SMALL))
    assert torch.equal(finished.latents, kept)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("height", 60),
        ("width", 0),
        ("width", 136),
        ("seed", 2**64),
        ("guidance_scale", float("nan")),
        ("guidance_skip", "much"),
        ("sampler", "magic"),
        ("num_inference_steps", 0),
    ],
)
def test_an_impossible_request_is_refused_by_its_field(
    denoiser: Denoiser, field: str, value: Any
) -> None:
    with pytest.raises(InvalidRequestError, match="Allowed: ") as caught:
        denoiser.admit("a", ATTEMPT, parameters(**{field: value}))
    assert caught.value.field == field
    assert not denoiser.held()


def test_no_more_requests_are_held_than_there_is_room_for(denoiser: Denoiser) -> None:
    for i in range(16):
        denoiser.admit(f"r{i}", ATTEMPT, parameters(**SMALL))
    with pytest.raises(OverloadedError):
        denoiser.admit("one more", ATTEMPT, parameters(**SMALL))
    denoiser.admit("r3", "1-2", parameters(**SMALL))
    assert len(denoiser.held()) == 16


def test_a_prompt_that_is_too_long_is_admitted_with_a_warning(denoiser: Denoiser) -> None:
    request = parameters(prompt="sun " * 20, negative_prompt="moon " * 15, **SMALL)
    warnings = denoiser.admit("a", ATTEMPT, request).warnings
    assert len(warnings) == 2
    assert warnings[0].startswith("prompt: the last 6 tokens were dropped")
    assert warnings[1].startswith("negative_prompt: the last 1 tokens were dropped")


# --- who fails -----------------------------------------------------------------------------------


def test_a_row_that_is_not_finite_fails_alone(denoiser: Denoiser) -> None:
    requests = {
        f"r{i}": parameters(seed=i, sampler=sampler, num_inference_steps=5, **SMALL)
        for i, sampler in enumerate([*SAMPLERS, "PNDMScheduler"])
    }
    expected = {
        request_id: denoise_alone(denoiser, request).latents
        for request_id, request in requests.items()
    }
    for request_id, request in requests.items():
        denoiser.admit(request_id, ATTEMPT, request)
    denoiser.run(next_rows(denoiser))
    poisoned = denoiser._store.get("r2", ATTEMPT)
    assert poisoned is not None
    with torch.inference_mode():
        poisoned.pool.latents[poisoned.row, 0, 0, 0] = float("nan")
    result = denoiser.run(next_rows(denoiser))
    (failure,) = result.failures
    assert (failure.request_id, failure.attempt, failure.code) == ("r2", ATTEMPT, "not_finite")
    assert "step 1" in failure.reason
    assert {row.request_id: row.next_step_index for row in result.rows}["r2"] == -1
    rest = denoise_held(denoiser)
    assert rest.keys() == requests.keys() - {"r2"}
    for request_id, finished in rest.items():
        torch.testing.assert_close(finished.latents, expected[request_id], rtol=1e-3, atol=1e-3)
    after = denoise_alone(denoiser, requests["r2"]).latents
    torch.testing.assert_close(after, expected["r2"], rtol=1e-3, atol=1e-3)


def test_a_sampler_that_raises_fails_its_own_request_only(denoiser: Denoiser) -> None:
    denoiser.admit("a", ATTEMPT, parameters(sampler="PNDMScheduler", **SMALL))
    denoiser.admit("b", ATTEMPT, parameters(**SMALL))
    broken = denoiser._store.get("a", ATTEMPT)
    assert broken is not None
    assert broken.scheduler is not None
    broken.scheduler._scheduler.step = lambda *_args, **_kwargs: 1 / 0
    result = denoiser.run(next_rows(denoiser))
    assert [failure.request_id for failure in result.failures] == ["a"]
    assert "ZeroDivisionError" in result.failures[0].reason
    assert "b" in denoise_held(denoiser)


@pytest.mark.parametrize("where", ["the UNet", "the update"])
def test_a_slot_that_runs_out_of_memory_may_be_tried_again(
    denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    request = parameters(sampler="euler_a", guidance_skip="balanced", **SMALL)
    expected = denoise_alone(denoiser, request).latents
    denoiser.admit("a", ATTEMPT, request)

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise torch.OutOfMemoryError

    for _ in range(3):
        denoiser.run(next_rows(denoiser))
        denoiser.draw_ahead(1)
        with monkeypatch.context() as patch:
            if where == "the UNet":
                patch.setattr(denoiser._model.unet, "forward", fail)
            else:
                patch.setattr(slot, "PoolUpdate", fail)
            with pytest.raises(torch.OutOfMemoryError):
                denoiser.run(next_rows(denoiser))
    torch.testing.assert_close(denoise_held(denoiser)["a"].latents, expected)


# --- skipped guidance ----------------------------------------------------------------------------


def _skipped_by_hand(
    denoiser: Denoiser, guidance_scale: float, full_steps: Sequence[int], num_steps: int
) -> torch.Tensor:
    """DDIM of a single request with extrapolated guidance, step by step in plain code."""
    parameters_ = SKIP_LEVELS["balanced"]
    assert parameters_ is not None
    model = denoiser._model
    positive, negative = denoiser.text_encoder.encode(["a red cat", "dog"])
    scheduler = denoiser.samplers.instance("ddim", num_steps)
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    kept: list[tuple[int, torch.Tensor]] = []
    for i, timestep in enumerate(scheduler.timesteps):
        text = model.unet(x, timestep, positive.embeds[None]).sample
        if i in full_steps:
            uncond = model.unet(x, timestep, negative.embeds[None]).sample
            kept = [*kept[-1:], (i, text - uncond)]
            eps = uncond + guidance_scale * (text - uncond)
        else:
            (older_step, older), (newest_step, newest) = kept
            record = GuidanceRecord(full_steps=(older_step, newest_step))
            weights = extrapolation_weights(parameters_, record, i)
            eps = text + (guidance_scale - 1) * (weights[0] * newest + weights[1] * older)
        x = scheduler.step(eps, timestep, x).prev_sample
    return x


def test_skipped_steps_extrapolate_the_guidance_of_the_last_full_ones(denoiser: Denoiser) -> None:
    request = parameters(
        negative_prompt="dog", num_inference_steps=20, guidance_skip="balanced", **SMALL
    )
    denoiser.admit("off", ATTEMPT, parameters(seed=4, num_inference_steps=20, **SMALL))
    denoiser.admit("kept full", ATTEMPT, request)
    denoiser.admit("skipped", ATTEMPT, request)
    denoiser.admit("unguided", ATTEMPT, parameters(guidance_scale=1.0, **SMALL))
    finished = {}
    skipped, can_skip_next = [], False
    num_unet_rows = 0
    while denoiser.held():
        rows = [
            _row(row.request_id, row.step_index, skip=row.request_id != "kept full")
            for row in next_rows(denoiser)
        ]
        result = denoiser.run(rows)
        num_unet_rows += result.num_unet_rows
        finished |= {one.request_id: one for one in result.finished}
        for row in result.rows:
            if row.request_id != "skipped":
                assert not row.was_skipped
                continue
            assert row.was_skipped == can_skip_next
            can_skip_next = row.can_skip
            if row.was_skipped:
                skipped.append(row.next_step_index - 1)
    expected_skips = finished["skipped"].skipped_steps
    assert expected_skips[:3] == tuple(skipped[:3])
    assert 4 <= len(expected_skips) <= 14
    assert num_unet_rows == 3 * 40 - len(expected_skips) + 6
    full_steps = [i for i in range(20) if i not in expected_skips]
    with torch.inference_mode():
        by_hand = _skipped_by_hand(denoiser, 5.0, full_steps, 20)
        in_full = _skipped_by_hand(denoiser, 5.0, range(20), 20)
    torch.testing.assert_close(finished["skipped"].latents, by_hand, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(finished["kept full"].latents, in_full, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(by_hand, in_full, rtol=1e-2, atol=1e-2)
    assert finished["off"].skipped_steps == finished["kept full"].skipped_steps == ()


def test_the_measured_error_is_that_of_the_extrapolation(denoiser: Denoiser) -> None:
    request = parameters(guidance_skip="balanced", num_inference_steps=12, **SMALL)
    level = SKIP_LEVELS["balanced"]
    assert level is not None
    denoiser.admit("a", ATTEMPT, request)
    said: list[torch.Tensor] = []
    hook = denoiser._model.unet.register_forward_hook(lambda *call: said.append(call[-1][0]))
    errors = [denoiser.run(next_rows(denoiser)).rows[0].skip_error for _ in range(4)]
    hook.remove()
    directions = [text - uncond for uncond, text in said]

    def expected(step: int, estimate: torch.Tensor) -> float:
        scale = request.guidance_scale
        guided = said[step][0] + scale * directions[step]
        return float((scale - 1) * (estimate - directions[step]).norm() / guided.norm())

    assert errors[1] == pytest.approx(expected(1, directions[0]), rel=1e-3)
    estimate = directions[2] + level.slope * (directions[2] - directions[1])
    estimate -= level.decay * directions[2]
    assert errors[3] == pytest.approx(expected(3, estimate), rel=1e-3)


def test_samplers_with_other_forwards_than_steps_never_skip(denoiser: Denoiser) -> None:
    request = parameters(
        sampler="HeunDiscreteScheduler", guidance_skip="fast", num_inference_steps=8, **SMALL
    )
    assert denoise_alone(denoiser, request, skip=True).skipped_steps == ()


# --- moving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [*SAMPLERS, "HeunDiscreteScheduler"])
@pytest.mark.parametrize("num_steps_before", [1, 8])
def test_a_request_goes_on_elsewhere_as_if_it_had_stayed(
    denoiser: Denoiser, other_denoiser: Denoiser, sampler: str, num_steps_before: int
) -> None:
    request = parameters(
        sampler=sampler, num_inference_steps=12, guidance_skip="fast", seed=11, **SMALL
    )
    expected = denoise_alone(denoiser, request, skip=True)
    other = other_denoiser
    other.admit("neighbour", ATTEMPT, parameters(**SMALL))
    denoiser.admit("a", ATTEMPT, request)
    for _ in range(num_steps_before):
        denoiser.run(next_rows(denoiser, skip=True))
        denoiser.draw_ahead()
    state = denoiser.export_state("a", ATTEMPT)
    assert state is not None
    denoise_held(denoiser)
    other.import_state(state)
    assert other.held()[1].step_index == num_steps_before
    finished = denoise_held(other, skip=True)["a"]
    assert finished.skipped_steps == expected.skipped_steps
    torch.testing.assert_close(finished.latents, expected.latents, rtol=1e-3, atol=1e-3)


def test_a_sampler_with_a_scheduler_of_its_own_starts_again_elsewhere(denoiser: Denoiser) -> None:
    denoiser.admit("a", ATTEMPT, parameters(sampler="PNDMScheduler", **SMALL))
    assert denoiser.export_state("a", ATTEMPT) is None
    assert denoiser.export_state("nobody", ATTEMPT) is None


def test_a_state_that_does_not_fit_its_request_is_refused(denoiser: Denoiser) -> None:
    denoiser.admit("a", ATTEMPT, parameters(**SMALL))
    state = denoiser.export_state("a", ATTEMPT)
    assert state is not None
    denoiser.release("a")
    with pytest.raises(ProtocolError):
        denoiser.import_state(replace(state, parameters=parameters(height=48, width=48)))
    with pytest.raises(ProtocolError):
        denoiser.import_state(replace(state, step_index=99))
    assert not denoiser.held()


# --- other dtypes, and measuring -----------------------------------------------------------------


def test_a_bfloat16_picture_is_close_to_the_float32_one(
    denoiser: Denoiser, tiny_model_folder: Path
) -> None:
    request = parameters(num_inference_steps=10, sampler="dpmpp_2m", **SMALL)
    expected = denoise_alone(denoiser, request).latents
    half = Denoiser(load_model(tiny_model_folder, device="cpu", dtype="bfloat16"))
    latents = denoise_alone(half, request).latents
    assert latents.dtype == torch.float32
    assert _psnr(latents, expected) > 30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "least_psnr"), [("float32", 50), ("float16", 40)])
def test_a_gpu_makes_the_cpus_pictures(
    denoiser: Denoiser, tiny_model_folder: Path, dtype: Any, least_psnr: float
) -> None:
    on_gpu = Denoiser(load_model(tiny_model_folder, device="cuda", dtype=dtype))
    requests = {
        sampler: parameters(
            sampler=sampler, num_inference_steps=8, guidance_skip="balanced", **SMALL
        )
        for sampler in [*SAMPLERS, "PNDMScheduler"]
    }
    for sampler, request in requests.items():
        on_gpu.admit(sampler, ATTEMPT, request)
    finished = denoise_held(on_gpu)
    for sampler, request in requests.items():
        latents = finished[sampler].latents
        assert latents.device.type == "cuda"
        assert _psnr(latents.cpu(), denoise_alone(denoiser, request).latents) > least_psnr


def test_levels_of_skipping_can_be_set_for_a_sweep(denoiser: Denoiser) -> None:
    every_other = SkipParameters(
        warm_up=0.0, first_gap=0.17, gap_growth=0.0, max_gap=0.17, max_error=1e9
    )
    swept = Denoiser(denoiser._model, skip_levels={"every other": every_other})
    request = parameters(guidance_skip="every other", num_inference_steps=12, **SMALL)
    assert denoise_alone(swept, request, skip=True).skipped_steps == (2, 4, 6, 8, 10)
    with pytest.raises(InvalidRequestError, match="every other"):
        swept.admit("a", ATTEMPT, parameters(guidance_skip="fast"))


def test_measuring_gives_milliseconds_by_rows(denoiser: Denoiser) -> None:
    denoiser.warm_up([(32, 32), (48, 32)], [1, 2])
    measured = denoiser.measure([1, 4], size=(32, 32), num_repeats=2)
    assert measured.keys() == {1, 4}
    assert all(0 < milliseconds < 60_000 for milliseconds in measured.values())


def test_a_size_to_warm_up_that_the_model_cannot_draw_is_refused(denoiser: Denoiser) -> None:
    with pytest.raises(ConfigurationError, match="33x32: both sides must be multiples of"):
        denoiser.warm_up([(32, 33)], [1])
