from __future__ import annotations

from itertools import combinations, pairwise

import torch
from decoders import (
    finish,
    make_latents,
    make_vae,
    noise_db,
    relative_difference,
    whole_decode,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from services.vae_worker.decoding import Granularity, decode_chunks, plan_chunks
from services.vae_worker.decoding.plan import balanced_cuts

STRIP_TOLERANCE = 5e-5
BF16_TOLERANCE_DB = 0.2

decoders = st.fixed_dictionaries(
    {
        "block_out_channels": st.lists(st.sampled_from((8, 16, 24)), min_size=1, max_size=4),
        "layers_per_block": st.integers(1, 2),
        "latent_channels": st.sampled_from((1, 4, 16)),
        "norm_num_groups": st.sampled_from((1, 4)),
        "mid_block_add_attention": st.booleans(),
        "use_post_quant_conv": st.booleans(),
        "act_fn": st.sampled_from(("silu", "silu", "gelu", "relu", "mish")),
        "memory_format": st.sampled_from((torch.channels_last, torch.contiguous_format)),
        "scaling_factor": st.sampled_from((1.0, 0.18215)),
        "seed": st.integers(0, 1000),
    }
)
latents_of = st.fixed_dictionaries(
    {
        "latent_height": st.integers(1, 6),
        "latent_width": st.integers(1, 6),
        "batch": st.integers(1, 4),
        "seed": st.integers(0, 1000),
    }
)
granularities = st.builds(
    Granularity,
    num_chunks=st.none() | st.integers(1, 24),
    max_strip_fraction=st.sampled_from((1e-9, 0.01, 0.05, 1.0)),
    max_strip_bytes=st.sampled_from((1, 2048, 1 << 20)),
)


def run(vae, latents, granularity):
    plan = plan_chunks(vae, *latents.shape[2:], granularity=granularity)
    num_yields = 0

    def counted():
        nonlocal num_yields
        chunks = decode_chunks(vae, latents, plan=plan)
        while True:
            try:
                done = next(chunks)
            except StopIteration as end:
                return end.value
            num_yields += 1
            yield done

    image = finish(counted())
    assert num_yields == plan.num_chunks - 1
    return image


@settings(max_examples=20, deadline=None)
@given(config=decoders, size=latents_of, num_chunks=st.none() | st.integers(1, 24))
def test_layer_chunks_give_the_bits_of_any_whole_decode(config, size, num_chunks):
    vae = make_vae(**config)
    latents = make_latents(vae, **size)
    image = run(vae, latents, Granularity(num_chunks=num_chunks))
    assert torch.equal(image, whole_decode(vae, latents))


@settings(max_examples=30, deadline=None)
@given(config=decoders, size=latents_of, granularity=granularities)
def test_strips_give_the_image_of_any_whole_decode(config, size, granularity):
    vae = make_vae(**config)
    latents = make_latents(vae, **size)
    image = run(vae, latents, granularity)
    assert relative_difference(image, whole_decode(vae, latents)) <= STRIP_TOLERANCE


@settings(max_examples=6, deadline=None)
@given(config=decoders, batch=st.integers(1, 2), granularity=granularities)
def test_strips_in_bf16_are_no_further_from_fp32_than_any_whole_bf16_decode(
    config, batch, granularity
):
    """On average over weights and latents: single roundings fall either way."""
    lost_db = []
    for seed in range(5):
        seeded = {**config, "seed": seed}
        exact, rounded = make_vae(**seeded), make_vae(**seeded, dtype=torch.bfloat16)
        latents = make_latents(rounded, 7, 6, batch=batch, seed=seed)
        reference = whole_decode(exact, latents.float())
        whole_db = noise_db(whole_decode(rounded, latents), reference)
        lost_db.append(noise_db(run(rounded, latents, granularity), reference) - whole_db)
    assert sum(lost_db) / len(lost_db) <= BF16_TOLERANCE_DB


@settings(max_examples=100, deadline=None)
@given(costs=st.lists(st.integers(0, 20), min_size=1, max_size=9), choice=st.integers(0, 8))
def test_cuts_make_the_dearest_part_as_cheap_as_brute_force_does(costs, choice):
    num_parts = 1 + choice % len(costs)
    cuts = balanced_cuts(costs, num_parts)
    assert (cuts[0], cuts[-1], len(cuts)) == (0, len(costs), num_parts + 1)
    assert all(first < end for first, end in pairwise(cuts))

    def dearest(edges):
        return max(sum(costs[first:end]) for first, end in pairwise(edges))

    best = min(
        dearest((0, *inner, len(costs)))
        for inner in combinations(range(1, len(costs)), num_parts - 1)
    )
    assert dearest(cuts) <= best * (1 + 1e-5)
