"""What can't be served is refused in one sentence, before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ConfigurationError
from shared.model_folder import check_model_folder, find_weights, model_digest

WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    return folder


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rename_weights(folder: Path, variant: str) -> None:
    for part, stem in WEIGHTS.items():
        path = folder / part / f"{stem}.safetensors"
        path.rename(path.with_name(f"{stem}.{variant}.safetensors"))


def rewrite_header(path: Path, rewrite: Callable[[dict[str, Any]], Any]) -> None:
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.dumps(rewrite(json.loads(raw[8:end]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])


def test_what_diffusers_writes_is_accepted(folder: Path) -> None:
    check_model_folder(folder)
    assert find_weights(folder, "unet").variant is None


def test_a_folder_of_one_variant_is_accepted(folder: Path) -> None:
    rename_weights(folder, "fp16")
    check_model_folder(folder)
    assert find_weights(folder, "unet").variant == "fp16"
    assert [path.name for path in find_weights(folder, "text_encoder").paths] == [
        "model.fp16.safetensors"
    ]


def test_shards_are_found_by_their_index(folder: Path) -> None:
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    shard = whole.with_name("diffusion_pytorch_model-00001-of-00001.safetensors")
    whole.rename(shard)
    index = whole.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": shard.name}}))
    check_model_folder(folder)
    assert find_weights(folder, "unet").paths == (shard,)
    shard.unlink()
    with pytest.raises(ConfigurationError, match="is missing, which"):
        check_model_folder(folder)


@pytest.mark.parametrize(
    ("file", "fields", "complaint"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "FluxPipeline"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "AutoencoderTiny"),
        ("model_index.json", {"unet": [None, None]}, "as unet"),
        ("model_index.json", {"scheduler": 3}, "as scheduler"),
    ],
)
def test_another_pipeline_is_named(
    folder: Path, file: str, fields: dict[str, Any], complaint: str
) -> None:
    change(folder / file, **fields)
    with pytest.raises(ConfigurationError, match=complaint):
        check_model_folder(folder)


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(ConfigurationError, match=file.rsplit("/", maxsplit=1)[-1]):
        check_model_folder(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "\x00"])
def test_a_configuration_that_is_no_object_is_named(folder: Path, content: str) -> None:
    (folder / "unet" / "config.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"unet/config\.json"):
        check_model_folder(folder)


@pytest.mark.parametrize("part", list(WEIGHTS))
def test_weights_that_are_cut_off_anywhere_are_refused(folder: Path, part: str) -> None:
    path = folder / part / f"{WEIGHTS[part]}.safetensors"
    raw = path.read_bytes()
    header_end = 8 + int.from_bytes(raw[:8], "little")
    for size in (0, 4, 8, header_end - 1, header_end, (header_end + len(raw)) // 2, len(raw) - 1):
        path.write_bytes(raw[:size])
        with pytest.raises(ConfigurationError, match=path.name):
            check_model_folder(folder)
    path.write_bytes(raw + b"x")
    with pytest.raises(ConfigurationError, match="damaged"):
        check_model_folder(folder)


def test_a_pointer_in_place_of_weights_is_named(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ConfigurationError, match="Git LFS"):
        check_model_folder(folder)


@pytest.mark.parametrize(
    ("tensor", "complaint"),
    [
        ({"dtype": "F8_E4M3"}, "F8_E4M3"),
        ({"shape": [1]}, "wrong about"),
        ({"data_offsets": None}, "wrong about"),
        ({"shape": "many"}, "wrong about"),
    ],
)
def test_a_header_that_can_not_be_is_refused(
    folder: Path, tensor: dict[str, Any], complaint: str
) -> None:
    def spoil(header: dict[str, Any]) -> dict[str, Any]:
        name = next(name for name in header if name.endswith("weight"))
        return header | {name: header[name] | tensor}

    rewrite_header(folder / "vae" / "diffusion_pytorch_model.safetensors", spoil)
    with pytest.raises(ConfigurationError, match=complaint):
        check_model_folder(folder)


def test_a_header_that_is_no_object_is_refused(folder: Path) -> None:
    rewrite_header(folder / "vae" / "diffusion_pytorch_model.safetensors", lambda _: [1])
    with pytest.raises(ConfigurationError, match="no safetensors file"):
        check_model_folder(folder)


def test_a_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"/nowhere/model_index\.json is missing"):
        check_model_folder(Path("/nowhere"))


def test_a_copy_has_the_same_digest(tiny_model_folder: Path, folder: Path) -> None:
    assert model_digest(folder) == model_digest(tiny_model_folder)


@pytest.mark.parametrize("part", list(WEIGHTS))
def test_another_training_of_a_model_has_another_digest(folder: Path, part: str) -> None:
    before = model_digest(folder)
    path = folder / part / f"{WEIGHTS[part]}.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-64:] = bytes(byte ^ 1 for byte in raw[-64:])
    path.write_bytes(raw)
    assert model_digest(folder) != before


@pytest.mark.parametrize(
    "file", ["unet/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"]
)
def test_another_configuration_has_another_digest(folder: Path, file: str) -> None:
    before = model_digest(folder)
    change(folder / file, changed=1)
    assert model_digest(folder) != before
