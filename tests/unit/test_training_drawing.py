"""The UNet's lessons on its own drawings, and the text encoder's on characters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from training.captions import vocabulary_texts
from training.characters import (
    CharacterSettings,
    character_tokens,
    end_states,
    share_understood,
    start_with_names,
    token_embeddings,
    train_characters,
    with_characters,
)
from training.diffusion import (
    NUM_TRAIN_TIMESTEPS,
    Denoiser,
    build_denoiser,
    build_sampler,
    build_text_encoder,
)
from training.drawing import (
    STEP_COUNTS,
    DrawingCourse,
    DrawingSettings,
    ddim_step,
    train_drawing,
    true_velocity,
)
from training.emoji_set import Emoji, character_forms, load_emoji_set
from training.loop import Draws
from training.tokenizer import tokenize, train_tokenizer
from training.vae import LATENT_CHANNELS, LATENT_SIZE

EMOJI_SET = load_emoji_set()[::40]
ALPHAS = build_sampler().alphas_cumprod


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return train_tokenizer(vocabulary_texts(EMOJI_SET), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def latents() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (len(EMOJI_SET), LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    return torch.randn(shape, generator=generator)


@pytest.fixture
def denoiser(tokenizer: CLIPTokenizer) -> Denoiser:
    torch.manual_seed(0)
    return build_denoiser(tokenizer, EMOJI_SET)


def test_the_true_velocity_of_a_noised_picture_is_the_samplers() -> None:
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 3, 1, 4, 4)
    timesteps = torch.tensor([39, 500, 999])
    sampler = build_sampler()
    noisy = sampler.add_noise(clean, noise, timesteps)
    torch.testing.assert_close(
        true_velocity(noisy, clean, ALPHAS[timesteps]),
        sampler.get_velocity(clean, noise, timesteps),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.parametrize("num_steps", sorted(set(STEP_COUNTS)))
def test_a_drawing_takes_the_steps_of_diffusers_own_sampler(
    num_steps: int, denoiser: Denoiser, latents: Tensor
) -> None:
    sampler = build_sampler()
    sampler.set_timesteps(num_steps)
    course = DrawingCourse(denoiser, underway=1, latents=latents)
    course.num_steps[0] = num_steps
    torch.manual_seed(0)
    ours = theirs = torch.randn(1, 2, 4, 4)
    for number, timestep in enumerate(sampler.timesteps):
        course.step_index[0] = number
        now, then = course.timesteps([0])
        assert now.item() == timestep
        velocity = torch.randn(1, 2, 4, 4)
        ours, _ = ddim_step(ours, velocity, ALPHAS[now], ALPHAS[then.clamp(min=0)])
        theirs = sampler.step(velocity, timestep, theirs).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_was_drawn_badly_is_drawn_more_often(
    denoiser: Denoiser, latents: Tensor, tokenizer: CLIPTokenizer
) -> None:
    course = DrawingCourse(denoiser, underway=1, latents=latents)
    course.errors[:] = 0.1
    course.errors[3] = 1.0
    drawn = []
    for step in range(200):
        draws = Draws(seed=0, step=step)
        course.begin(0, EMOJI_SET, lambda captions: tokenize(tokenizer, captions), draws)
        drawn.append(course.picture.item())
    assert drawn.count(3) > 150
    assert len(set(drawn)) > 3


def test_the_course_draws_on_and_its_checkpoint_keeps_what_is_underway(
    denoiser: Denoiser, latents: Tensor, tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    def study(steps: int) -> DrawingCourse:
        settings = DrawingSettings(steps=steps, rows=1, drawings=2, underway=2)
        average = train_drawing(
            denoiser,
            tokenizer,
            emoji_set=EMOJI_SET,
            latents=latents,
            settings=settings,
            checkpoint=tmp_path / "course.pt",
        )
        assert isinstance(average, DrawingCourse)
        return average

    study(3)
    course = torch.load(tmp_path / "course.pt", weights_only=True)["module"]
    assert course["step_index"].tolist() == [3, 3]
    study(4)
    resumed = torch.load(tmp_path / "course.pt", weights_only=True)["module"]
    assert resumed["step_index"].tolist() == [4, 4]
    assert torch.equal(resumed["picture"], course["picture"])
    assert not torch.equal(resumed["latents"], course["latents"])


def test_characters_come_to_mean_their_names_and_words_stay(
    tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    text_encoder = build_text_encoder(tokenizer)
    names = tokenize(tokenizer, [emoji.name for emoji in EMOJI_SET])
    drawn = tokenize(tokenizer, [character_forms(emoji.characters)[-1] for emoji in EMOJI_SET])

    @torch.no_grad()
    def distance() -> float:
        difference = end_states(text_encoder, names) - end_states(text_encoder, drawn)
        return difference.square().mean().sqrt().item()

    assert share_understood(text_encoder, tokenizer, EMOJI_SET) < 0.5
    start_with_names(text_encoder, tokenizer, EMOJI_SET)
    start, before = distance(), token_embeddings(text_encoder).clone()
    train_characters(
        text_encoder,
        tokenizer,
        emoji_set=EMOJI_SET,
        settings=CharacterSettings(steps=40, rows=16),
        checkpoint=tmp_path / "characters.pt",
    )
    assert distance() < 0.6 * start
    assert share_understood(text_encoder, tokenizer, EMOJI_SET) == 1
    changed = (token_embeddings(text_encoder) != before).any(dim=1).nonzero().flatten().tolist()
    assert set(changed) == set(character_tokens(tokenizer, EMOJI_SET))


def test_an_encoder_with_more_tokens_encodes_the_words_it_knew_as_before(
    tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    words_only = train_tokenizer(
        [caption for emoji in EMOJI_SET for caption in emoji.captions], tmp_path
    )
    captions = [emoji.name for emoji in EMOJI_SET]
    text_encoder = build_text_encoder(words_only).eval()
    with torch.no_grad():
        before = text_encoder(tokenize(words_only, captions))[0]
        grown = with_characters(text_encoder, words_only, tokenizer, EMOJI_SET)
        after = grown(tokenize(tokenizer, captions))[0]
    assert len(token_embeddings(grown)) == len(tokenizer) > len(words_only)
    torch.testing.assert_close(after, before)


def test_every_emoji_has_tokens_of_its_own(tokenizer: CLIPTokenizer) -> None:
    forms = {
        form: tuple(tokenizer.tokenize(form))
        for emoji in EMOJI_SET
        for form in character_forms(emoji.characters)
    }
    assert len(set(forms.values())) == len(forms)
    assert max(len(tokens) for tokens in forms.values()) == 2


def test_drawings_take_steps_that_divide_the_schedule() -> None:
    assert all(NUM_TRAIN_TIMESTEPS % count == 0 for count in STEP_COUNTS)


def test_an_emoji_is_asked_for_by_its_characters_too() -> None:
    apple = Emoji(characters="🍎", name="red apple", synonyms=(), category="food")
    assert "🍎" in set(vocabulary_texts((apple,)))
