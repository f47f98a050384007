"""Noise in diffusers' order, and pools that grow, shrink and keep their rows."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
import torch
from denoising import parameters

from services.unet_worker.denoising.coefficients import COLUMNS, CoefficientTable
from services.unet_worker.denoising.latents import (
    LatentStore,
    NoiseSource,
    Resident,
)
from services.unet_worker.families.loading import load_family
from services.unet_worker.families.protocol import Encoding, Family, InitialState
from shared.errors import OverloadedError

SHAPE = (1, 4, 8, 8)


@pytest.fixture(scope="module")
def family(tiny_model_folder: Path) -> Family:
    return load_family(tiny_model_folder, device="cpu", dtype="float32")


def _store(family: Family, max_requests: int = 64) -> LatentStore:
    return LatentStore(family, max_requests=max_requests, max_forwards=10)


def _add(store: LatentStore, seed: int, shape: tuple[int, int, int, int] = SHAPE) -> Resident:
    table = CoefficientTable(
        rows=torch.full((3, len(COLUMNS)), float(seed)),
        draws_noise=(False,) * 3,
        init_noise_sigma=2.0,
        is_linear=True,
    )
    resident = Resident(
        request_id=f"r{seed}",
        attempt="1-1",
        parameters=parameters(seed=seed, guidance_scale=float(seed)),
        warnings=(),
        table=table,
        is_guided=True,
        skip_parameters=None,
        noise=NoiseSource(seed, shape, 0),
    )
    embeds = torch.full((16, 32), float(seed))
    encoding = Encoding(
        negative={"prompt_embeds": -embeds}, positive={"prompt_embeds": embeds}, warnings=()
    )
    state = InitialState(latents=2.0 * resident.noise.initial[0], step_index=0)
    store.add(resident, str(shape), state, encoding)
    return resident


def _assert_intact(resident: Resident) -> None:
    pool, row, seed = resident.pool, resident.row, resident.parameters.seed
    assert pool.residents[row] is resident
    assert torch.equal(pool.latents[row], 2.0 * resident.noise.initial[0])
    assert (pool.conditions["prompt_embeds"][row, 0] == -seed).all()
    assert (pool.conditions["prompt_embeds"][row, 1] == seed).all()
    assert (pool.schedule[row, :3] == seed).all()
    assert pool.guidance_scale[row] == seed


def _take(noise: NoiseSource) -> torch.Tensor:
    tensor = noise.peek()
    assert noise.peek() is tensor
    noise.drop()
    return tensor


def test_noise_comes_as_one_generator_draws_it_ahead_or_not() -> None:
    generator = torch.Generator().manual_seed(5)
    expected = [torch.randn(SHAPE, generator=generator) for _ in range(5)]
    for num_ahead in (0, 1, 3, 9):
        noise = NoiseSource(5, SHAPE, 4)
        assert torch.equal(noise.initial, expected[0])
        for tensor in expected[1:]:
            noise.draw_ahead(num_ahead)
            assert torch.equal(_take(noise), tensor)


def test_no_more_noise_is_drawn_ahead_than_will_be_taken() -> None:
    noise = NoiseSource(5, SHAPE, 2)
    state = noise.generator.get_state()
    _take(noise)
    _take(noise)
    after = noise.generator.get_state()
    noise.draw_ahead(4)
    assert torch.equal(noise.generator.get_state(), after)
    assert not torch.equal(state, after)


def test_drawing_ahead_in_another_thread_changes_nothing() -> None:
    expected = NoiseSource(9, SHAPE, 200)
    noise = NoiseSource(9, SHAPE, 200)
    is_done = threading.Event()

    def draw() -> None:
        while not is_done.is_set():
            noise.draw_ahead(3)

    thread = threading.Thread(target=draw)
    thread.start()
    taken = [_take(noise) for _ in range(200)]
    is_done.set()
    thread.join()
    assert all(torch.equal(tensor, _take(expected)) for tensor in taken)


def test_rows_survive_a_pool_that_grows_and_shrinks(family: Family) -> None:
    store, chance = _store(family), random.Random(0)
    held: list[Resident] = []
    sizes = set()
    for target in (20, 3, 33, 1, 12):
        while len(held) < target:
            held.append(_add(store, len(sizes) * 1000 + len(held) + 1))
        chance.shuffle(held)
        while len(held) > target:
            assert store.release(held.pop().request_id)
        for resident in held:
            _assert_intact(resident)
        assert len({resident.row for resident in held}) == len(held)
        pool = held[0].pool
        assert len(pool.latents) <= max(4 * len(held), 2)
        sizes.add(len(pool.latents))
    assert len(sizes) > 3


def test_each_batch_key_has_its_pool_and_empty_pools_go(family: Family) -> None:
    store = _store(family)
    first = _add(store, 1)
    second = _add(store, 2, (1, 4, 8, 12))
    assert first.pool is not second.pool
    assert second.pool.latents.shape[1:] == (4, 8, 12)
    old_pool = first.pool
    store.release("r1")
    _add(store, 3, (1, 4, 4, 8))
    assert _add(store, 4).pool is not old_pool


def test_a_full_store_refuses_and_stays_as_it_is(family: Family) -> None:
    store = _store(family, max_requests=2)
    held = [_add(store, 1), _add(store, 2)]
    with pytest.raises(OverloadedError):
        _add(store, 3)
    for resident in held:
        _assert_intact(resident)
    store.release("r1")
    _add(store, 3)


def test_another_attempts_release_changes_nothing(family: Family) -> None:
    store = _store(family)
    resident = _add(store, 1)
    assert not store.release("r1", "1-2")
    assert store.get("r1", "1-1") is resident
    assert store.get("r1", "1-2") is None
    assert store.release("r1", "1-1")
    assert not store.release("r1", "1-1")
