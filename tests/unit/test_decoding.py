from __future__ import annotations

import gc
import weakref

import pytest
import torch
from decoders import (
    finish,
    make_latents,
    make_tiny_vae,
    make_vae,
    noise_db,
    relative_difference,
    whole_decode,
)
from torch import Tensor

from services.vae_worker.decoding import Granularity, decode_chunks, plan_chunks
from services.vae_worker.decoding.strips import FeatureMap, merge_moments, strip_moments
from shared.errors import ConfigurationError

LAYERS = Granularity()
ONE_ROW_STRIPS = Granularity(max_strip_fraction=1e-9)
STRIP_TOLERANCE = 5e-5
BF16_TOLERANCE_DB = 0.2


def decode(vae, latents: Tensor, granularity: Granularity) -> Tensor:
    plan = plan_chunks(vae, *latents.shape[2:], granularity=granularity)
    return finish(decode_chunks(vae, latents, plan=plan))


@pytest.mark.parametrize(
    ("dtype", "memory_format", "num_threads"),
    [
        (torch.float32, torch.channels_last, 1),
        (torch.float32, torch.channels_last, 2),
        (torch.float32, torch.contiguous_format, 1),
        (torch.bfloat16, torch.channels_last, 1),
        (torch.bfloat16, torch.contiguous_format, 1),
    ],
)
def test_layer_chunks_give_the_bits_of_the_whole_decode(dtype, memory_format, num_threads):
    vae = make_vae(dtype=dtype, memory_format=memory_format)
    latents = make_latents(vae, 5, 7, batch=2)
    expected = whole_decode(vae, latents)
    torch.set_num_threads(num_threads)
    assert torch.equal(decode(vae, latents, LAYERS), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", [LAYERS, Granularity(max_strip_fraction=0.02)])
def test_a_picture_is_the_same_on_any_number_of_threads(dtype, granularity):
    vae = make_vae(dtype=dtype)
    latents = make_latents(vae, 13, 11)
    image = decode(vae, latents, granularity)
    for num_threads in (2, 3):
        torch.set_num_threads(num_threads)
        assert torch.equal(decode(vae, latents, granularity), image)


@pytest.mark.parametrize("num_chunks", [1, 4, 8])
def test_merged_layer_chunks_give_the_same_bits(num_chunks):
    vae = make_vae()
    latents = make_latents(vae, 6, 4)
    image = decode(vae, latents, Granularity(num_chunks=num_chunks))
    assert torch.equal(image, whole_decode(vae, latents))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("size", [(5, 7), (1, 3), (8, 8)])
@pytest.mark.parametrize("granularity", [ONE_ROW_STRIPS, Granularity(max_strip_fraction=0.02)])
def test_strips_give_the_image_of_the_whole_decode(memory_format, batch, size, granularity):
    vae = make_vae(memory_format=memory_format)
    latents = make_latents(vae, *size, batch=batch)
    image = decode(vae, latents, granularity)
    assert relative_difference(image, whole_decode(vae, latents)) <= STRIP_TOLERANCE


@pytest.mark.parametrize("batch", [1, 3])
def test_strips_in_bf16_stay_as_near_to_fp32_as_the_whole_bf16_decode(batch):
    exact, rounded = make_vae(), make_vae(dtype=torch.bfloat16)
    latents = make_latents(rounded, 9, 6, batch=batch)
    reference = whole_decode(exact, latents.float())
    whole_db = noise_db(whole_decode(rounded, latents), reference)
    strip_db = noise_db(decode(rounded, latents, ONE_ROW_STRIPS), reference)
    assert strip_db <= whole_db + BF16_TOLERANCE_DB


def test_attention_in_the_up_blocks_is_decoded_too():
    vae = make_vae(up_block_type="AttnUpDecoderBlock2D")
    latents = make_latents(vae, 3, 4)
    whole = whole_decode(vae, latents)
    assert torch.equal(decode(vae, latents, LAYERS), whole)
    assert relative_difference(decode(vae, latents, ONE_ROW_STRIPS), whole) <= STRIP_TOLERANCE


def test_a_residual_is_divided_by_the_blocks_scale_factor():
    vae = make_vae()
    for block in vae.decoder.up_blocks:
        for resnet in block.resnets:
            resnet.output_scale_factor = 1.5
    latents = make_latents(vae, 4, 4)
    whole = whole_decode(vae, latents)
    assert torch.equal(decode(vae, latents, LAYERS), whole)
    assert relative_difference(decode(vae, latents, ONE_ROW_STRIPS), whole) <= STRIP_TOLERANCE


def test_latents_of_another_dtype_are_scaled_before_they_are_rounded():
    vae = make_vae(dtype=torch.bfloat16)
    latents = make_latents(vae, 4, 4).float() * 1.001
    scaled = (latents / vae.config.scaling_factor).bfloat16()
    with torch.inference_mode():
        expected = vae.decode(scaled, return_dict=False)[0]
    assert torch.equal(decode(vae, latents, LAYERS), expected)


@pytest.mark.parametrize("num_chunks", [1, 3, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("upsample_fn", ["nearest", "bilinear"])
def test_a_tiny_decoder_gives_the_bits_of_its_whole_decode(dtype, num_chunks, upsample_fn):
    vae = make_tiny_vae(dtype=dtype, scaling_factor=0.5, upsample_fn=upsample_fn)
    latents = make_latents(vae, 5, 7, batch=2)
    image = decode(vae, latents, Granularity(num_chunks=num_chunks, max_strip_fraction=0.01))
    assert image.shape == (2, 3, 20, 28)
    assert torch.equal(image, whole_decode(vae, latents))


@pytest.mark.parametrize("make", [make_vae, make_tiny_vae])
def test_latents_are_shifted_as_the_configuration_says(make):
    vae = make(scaling_factor=0.5, shift_factor=0.25)
    latents = make_latents(vae, 4, 4)
    whole = whole_decode(vae, latents)
    assert torch.equal(decode(vae, latents, LAYERS), whole)
    assert not torch.equal(whole, whole_decode(make(scaling_factor=0.5), latents))


def test_the_decode_yields_once_between_two_chunks_and_leaves_the_callers_grad_mode_alone():
    vae = make_vae()
    plan = plan_chunks(vae, 4, 4, granularity=Granularity(num_chunks=5, max_strip_fraction=0.05))
    chunks = decode_chunks(vae, make_latents(vae, 4, 4), plan=plan)
    seen = []
    for done in chunks:
        seen.append(done)
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    assert seen == [1, 2, 3, 4]
    assert plan.num_chunks == 5


def test_a_closed_decode_runs_nothing_more_and_frees_all_it_held():
    vae = make_vae()
    ran = []
    for module in vae.decoder.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.register_forward_hook(lambda *_: ran.append(1))
    plan = plan_chunks(vae, 4, 4, granularity=LAYERS)

    def live_tensors() -> int:
        gc.collect()
        return sum(type(thing) is Tensor for thing in gc.get_objects())

    latents = make_latents(vae, 4, 4)
    before = live_tensors()
    chunks = decode_chunks(vae, latents, plan=plan)
    for _ in range(plan.num_chunks // 2):
        next(chunks)
    ran_before = len(ran)
    assert live_tensors() > before
    chunks.close()
    assert live_tensors() == before
    assert 0 < len(ran) == ran_before


def test_strips_free_the_rows_that_are_done_with():
    source = FeatureMap(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    first = weakref.ref(source.rows(0, 3)._base)
    source.release(2)
    assert first() is not None
    source.release(3)
    assert first() is None
    assert source.height == 6


def test_a_strip_decode_holds_little_more_than_its_largest_map(monkeypatch):
    strips = []

    def append(self, strip, **options):
        strips.append((weakref.ref(strip), strip.nbytes))
        original(self, strip, **options)

    original = FeatureMap.append
    monkeypatch.setattr(FeatureMap, "append", append)
    vae = make_vae()
    latents = make_latents(vae, 16, 16)
    plan = plan_chunks(vae, 16, 16, granularity=Granularity(max_strip_fraction=0.005))
    peak = max(
        sum(size for strip, size in strips if strip() is not None)
        for _ in decode_chunks(vae, latents, plan=plan)
    )
    largest_map = 16 * 64 * 64 * 4  # the input of the last block
    assert largest_map < peak < 1.2 * largest_map


def test_shared_strips_live_until_both_maps_have_released_them():
    source = FeatureMap(torch.ones(1, 2, 3, 4))
    twin = source.share()
    strip = weakref.ref(source.rows(0, 3)._base)
    source.release(3)
    assert strip() is not None
    twin.release(3)
    assert strip() is None


def test_rows_beyond_the_edges_are_zero():
    strips = torch.rand(2, 3, 7, 5).split([2, 1, 4], dim=2)
    source = FeatureMap(*strips)
    rows = source.rows(-1, 8)
    assert torch.equal(rows[:, :, 1:-1], torch.cat(strips, dim=2))
    assert not rows[:, :, 0].any()
    assert not rows[:, :, -1].any()
    assert torch.equal(source.rows(1, 4), torch.cat(strips, dim=2)[:, :, 1:4])


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_merged_moments_are_those_of_the_whole_map_even_far_from_zero(memory_format, dtype):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 8, 11, 5, generator=generator, dtype=torch.float64)
    features = features * torch.arange(1, 9).view(-1, 1, 1) + 100
    features = features.to(dtype).to(memory_format=memory_format)
    parts = [strip_moments(strip) for strip in features.split([1, 6, 4], dim=2)]
    merged = merge_moments(parts, num_groups=2)

    groups = features.double().reshape(3, 2, -1)
    variance, mean = torch.var_mean(groups, dim=2, correction=0)
    expected = (mean.repeat_interleave(4, dim=1), variance.repeat_interleave(4, dim=1))
    assert merged.mean.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(merged.mean.double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(merged.variance.double(), expected[1], rtol=1e-5, atol=0)


def test_statistics_of_single_strips_would_be_seen():
    """The tolerance tells an exact decode from a tiled one."""
    vae = make_vae()
    latents = make_latents(vae, 8, 8)
    halves = [decode(vae, half, LAYERS) for half in latents.split(4, dim=2)]
    whole = whole_decode(vae, latents)
    assert relative_difference(torch.cat(halves, dim=2), whole) > 100 * STRIP_TOLERANCE


def test_strips_cost_no_more_than_asked_for_unless_they_are_single_rows():
    vae = make_vae()
    plan = plan_chunks(vae, 16, 16, granularity=Granularity(max_strip_fraction=0.04))
    strips = [unit for unit in plan.units if not unit.is_whole]
    assert strips
    for unit in strips:
        assert unit.cost <= 0.04 * 1.05 or unit.end_row - unit.first_row == 1


def test_strips_are_no_larger_than_asked_for():
    vae = make_vae(block_out_channels=(8, 16))
    granularity = Granularity(max_strip_fraction=1.0, max_strip_bytes=4096)
    plan = plan_chunks(vae, 16, 16, granularity=granularity)
    heights = {unit.end_row - unit.first_row for unit in plan.units if unit.name == "conv_out"}
    assert heights == {4}  # 8 channels of 32 floats are 1 KiB a row
    latents = make_latents(vae, 16, 16)
    image = decode(vae, latents, granularity)
    assert relative_difference(image, whole_decode(vae, latents)) <= STRIP_TOLERANCE


def test_units_cover_every_stage_once_and_their_costs_sum_to_one():
    plan = plan_chunks(make_vae(), 5, 6, granularity=Granularity(max_strip_fraction=0.03))
    assert sum(chunk.cost for chunk in plan.chunks) == pytest.approx(1)
    for stage in {unit.stage for unit in plan.units}:
        rows = [(unit.first_row, unit.end_row) for unit in plan.units if unit.stage == stage]
        assert rows[0][0] == 0
        assert all(first < end for first, end in rows)
        assert [end for _, end in rows[:-1]] == [first for first, _ in rows[1:]]


def test_measured_costs_move_the_cuts():
    vae = make_vae()
    granularity = Granularity(num_chunks=2)
    num_units = len(plan_chunks(vae, 8, 8, granularity=LAYERS).units)
    dear_end = [1.0] * (num_units - 1) + [100.0 * num_units]
    plan = plan_chunks(vae, 8, 8, granularity=granularity, unit_costs=dear_end)
    assert [len(chunk.units) for chunk in plan.chunks] == [num_units - 1, 1]


@pytest.mark.parametrize("costs", [[1.0], [0.0] * 16])
def test_measured_costs_that_do_not_fit_are_refused(costs):
    with pytest.raises(ConfigurationError, match="cost"):
        plan_chunks(
            make_vae(block_out_channels=(8, 16)), 8, 8, granularity=LAYERS, unit_costs=costs
        )


def test_more_chunks_than_units_are_as_many_as_units():
    vae = make_vae()
    plan = plan_chunks(vae, 4, 4, granularity=Granularity(num_chunks=1000))
    assert plan.num_chunks == len(plan.units)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_chunks": 0},
        {"max_strip_fraction": 0.0},
        {"max_strip_fraction": 2.0},
        {"max_strip_bytes": 0},
    ],
)
def test_a_granularity_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        Granularity(**wrong)


def test_a_plan_for_other_latents_or_another_decoder_is_refused():
    vae = make_vae()
    plan = plan_chunks(vae, 4, 4, granularity=LAYERS)
    with pytest.raises(ConfigurationError, match="4 x 4"):
        next(decode_chunks(vae, make_latents(vae, 4, 5), plan=plan))
    other = make_vae(block_out_channels=(8, 16))
    with pytest.raises(ConfigurationError, match="other layers"):
        next(decode_chunks(other, make_latents(other, 4, 4), plan=plan))


def test_a_block_that_cannot_be_taken_apart_is_refused_by_name():
    vae = make_vae()
    vae.decoder.up_blocks[1] = torch.nn.Identity()
    with pytest.raises(ConfigurationError, match=r"up_blocks\.1.*Identity"):
        plan_chunks(vae, 4, 4, granularity=LAYERS)
