from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from training.captions import vocabulary_texts
from training.contact_sheet import contact_sheet
from training.diffusion import (
    NOISY_BIAS,
    build_denoiser,
    build_sampler,
    stratified_timesteps,
    velocity_weights,
)
from training.emoji_set import load_emoji_set
from training.loop import Draws, LoopSettings, cosine_rate, train
from training.retrieval import REFERENCE_SIZE, References, load_references, shrink
from training.tokenizer import tokenize, train_tokenizer
from training.vae import (
    LATENT_CHANNELS,
    VaeSettings,
    build_vae,
    fold_normalisation,
    sharpness_loss,
    steepness_loss,
    train_decoder,
)


def settings(steps: int) -> LoopSettings:
    return LoopSettings(
        steps=steps,
        peak_rate=0.1,
        weight_decay=0.0,
        average_decay=0.9,
        seed=0,
        warmup_steps=2,
    )


def fit(steps: int, checkpoint: Path) -> tuple[nn.Module, nn.Module]:
    """Fit a line to noisy points; returns the module and its average."""
    torch.manual_seed(0)
    line = nn.Linear(1, 1)

    def loss_of(draws: Draws) -> Tensor:
        x = torch.randn(16, 1, generator=draws.generator)
        return (line(x) - 3 * x).square().mean()

    average = train(line, loss_of, settings(steps), checkpoint)
    return line, average


def test_folded_normalisation_gives_the_normalised_latents_and_the_same_pictures() -> None:
    torch.manual_seed(0)
    vae = build_vae().eval()
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before = vae.encode(pictures).latent_dist
        decoded = vae.decode(before.mean).sample
        mean, std = torch.randn(LATENT_CHANNELS), torch.rand(LATENT_CHANNELS) + 0.5
        fold_normalisation(vae, mean, std)
        after = vae.encode(pictures).latent_dist
        shape = (1, -1, 1, 1)
        torch.testing.assert_close(
            after.mean, (before.mean - mean.view(shape)) / std.view(shape), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(after.std, before.std / std.view(shape), rtol=1e-4, atol=1e-5)
        # Padding sees another value at the border than before: none here, the layer is 1x1.
        torch.testing.assert_close(vae.decode(after.mean).sample, decoded, rtol=1e-4, atol=1e-4)


def test_a_sharp_edge_two_pixels_off_costs_less_sharpness_than_a_blur_between_the_two() -> None:
    picture = torch.ones(1, 3, 64, 64)
    picture[..., 33:] = -1
    shifted = torch.ones(1, 3, 64, 64)
    shifted[..., 35:] = -1
    blur = (picture + shifted) / 2
    assert sharpness_loss(picture, picture) == 0
    assert sharpness_loss(shifted, picture) < 0.5 * sharpness_loss(blur, picture)
    assert steepness_loss(picture, picture) == 0
    assert steepness_loss(shifted, picture) < 0.5 * steepness_loss(blur, picture)


def test_the_decoder_alone_learns_from_what_was_drawn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = build_vae()
    before = {name: weight.clone() for name, weight in vae.state_dict().items()}
    latents = torch.randn(3, LATENT_CHANNELS, 16, 16)
    train_decoder(
        vae,
        latents=latents,
        drawn=latents + 0.5,
        pixels=torch.randint(0, 256, (3, 3, 128, 128), dtype=torch.uint8),
        settings=VaeSettings(decoder_steps=2),
        checkpoint=tmp_path / "decoder.pt",
    )
    changed = {name for name, weight in vae.state_dict().items() if not weight.equal(before[name])}
    assert changed
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)


def test_training_resumed_ends_where_training_in_one_go_ends(tmp_path: Path) -> None:
    whole, whole_average = fit(8, tmp_path / "whole.pt")
    torch.manual_seed(0)
    line = nn.Linear(1, 1)

    class StopError(Exception):
        pass

    def loss_of(draws: Draws) -> Tensor:
        if draws.step == 5 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise StopError
        x = torch.randn(16, 1, generator=draws.generator)
        return (line(x) - 3 * x).square().mean()

    # Stops after 5 of its steps with a checkpoint of the first 4, and goes on from there.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.loop.SAVE_EVERY_S", -1.0)
        with pytest.raises(StopError):
            train(line, loss_of, settings(8), tmp_path / "parts.pt")
        average = train(line, loss_of, settings(8), tmp_path / "parts.pt")
    torch.testing.assert_close(line.state_dict(), whole.state_dict())
    torch.testing.assert_close(average.state_dict(), whole_average.state_dict())


def test_training_learns(tmp_path: Path) -> None:
    line, average = fit(150, tmp_path / "line.pt")
    assert isinstance(line, nn.Linear)
    assert isinstance(average, nn.Linear)
    assert line.weight.item() == pytest.approx(3, abs=0.05)
    assert average.weight.item() == pytest.approx(3, abs=0.3)


def test_every_picture_comes_once_per_epoch() -> None:
    drawn = [index for step in range(10) for index in Draws(seed=1, step=step).indices(20, rows=4)]
    assert sorted(drawn[:20]) == list(range(20))
    assert sorted(drawn[20:]) == list(range(20))
    assert drawn[:20] != drawn[20:]


def test_the_rate_warms_up_peaks_and_falls_to_a_hundredth() -> None:
    rates = [cosine_rate(step, settings(100)) for step in range(101)]
    assert rates[0] == pytest.approx(0.05)
    assert max(rates) == pytest.approx(0.1, rel=0.01)
    assert rates[100] == pytest.approx(0.001)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_timesteps_cover_the_whole_schedule_in_every_batch() -> None:
    timesteps = stratified_timesteps(Draws(seed=0, step=0), 100)
    counts = torch.bincount(timesteps // 100, minlength=10).tolist()
    assert len(counts) == 10
    assert min(counts) >= 3
    noisy = (timesteps >= 500).double().mean().item()
    assert noisy == pytest.approx(1 - 0.5 ** (1 / NOISY_BIAS), abs=0.02)


def test_the_schedule_ends_in_noise_but_not_in_nothing_else() -> None:
    last = build_sampler().alphas_cumprod[-1].sqrt().item()
    assert 0.01 < last < 0.03


def test_weights_are_one_where_noise_rules_and_small_where_little_is_left() -> None:
    weights = velocity_weights(build_sampler().alphas_cumprod)
    assert weights[-1].item() == 1.0
    assert weights[0].item() < 0.01
    assert bool((weights.diff() >= 0).all())


def references(pictures: Tensor) -> References:
    return References(
        characters=tuple("abcdefgh"[: len(pictures)]),
        captions=tuple(((f"picture {i}", "thing")) for i in range(len(pictures))),
        pictures=pictures,
    )


def test_references_survive_the_disk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = references((torch.rand(5, 3, REFERENCE_SIZE, REFERENCE_SIZE) * 255).round() / 255)
    saved.save(tmp_path)
    loaded = load_references(tmp_path)
    assert (loaded.characters, loaded.captions) == (saved.characters, saved.captions)
    torch.testing.assert_close(loaded.pictures, saved.pictures)


def test_the_nearest_reference_is_found_and_near_duplicates_share_a_group() -> None:
    torch.manual_seed(0)
    first, second = torch.rand(2, 3, REFERENCE_SIZE, REFERENCE_SIZE)
    known = references(torch.stack([first, second, first + 0.01]))
    assert known.nearest(torch.stack([second + 0.05, first - 0.02])) == [1, 0]
    groups = known.groups()
    assert groups[0] == groups[2] != groups[1]


def test_shrinking_keeps_mean_colours() -> None:
    picture = Image.new("RGB", (128, 128), (255, 0, 51))
    small = shrink(picture)
    assert small.shape == (3, REFERENCE_SIZE, REFERENCE_SIZE)
    torch.testing.assert_close(small.mean(dim=(1, 2)), torch.tensor([1.0, 0.0, 0.2]))


def test_a_sheet_has_a_cell_for_every_picture() -> None:
    pictures = [Image.new("RGB", (16, 16), (255, 0, 0))] * 5
    sheet = contact_sheet(pictures, ["red"] * 5, columns=2)
    assert sheet.width == 2 * 22
    assert sheet.height == 3 * (22 + 18)
    reds = sum(sheet.getpixel((x, y)) == (255, 0, 0) for x in range(44) for y in range(120))
    assert reds == 5 * 256


def test_fresh_weights_tell_pictures_apart_however_they_are_asked_for(tmp_path: Path) -> None:
    emoji_set = load_emoji_set()[::13]
    tokenizer = train_tokenizer(vocabulary_texts(emoji_set), tmp_path)
    torch.manual_seed(0)
    denoiser = build_denoiser(tokenizer, emoji_set)

    def embed(captions: list[str]) -> Tensor:
        token_ids = tokenize(tokenizer, captions)
        return denoiser.unet.add_embedding(denoiser.text_encoder(token_ids)[0])

    names = embed([emoji.name for emoji in emoji_set])
    asked = embed([f"a picture of a {emoji.name}" for emoji in emoji_set])
    centre = names.mean(dim=0)
    similarity = nn.functional.cosine_similarity(
        (asked - centre).unsqueeze(1), (names - centre).unsqueeze(0), dim=2
    )
    assert similarity.argmax(dim=1).tolist() == list(range(len(emoji_set)))
    energies = torch.linalg.svdvals(names - centre).square()
    effective_rank = energies.sum().square() / energies.square().sum()
    assert effective_rank > len(emoji_set) / 2


def test_only_the_unet_learns(tmp_path: Path) -> None:
    emoji_set = load_emoji_set()[:4]
    denoiser = build_denoiser(train_tokenizer(vocabulary_texts(emoji_set), tmp_path), emoji_set)
    learning = {name for name, weight in denoiser.named_parameters() if weight.requires_grad}
    assert not any("text_encoder" in name or "add_embedding" in name for name in learning)
    assert "unet.conv_in.weight" in learning
