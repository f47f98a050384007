"""A model's folder in diffusers' format: what it has to hold, and the digest that it is known by.

Only configurations and the headers of weight files are read, so this takes milliseconds and needs
no tensor library.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shared.errors import ConfigurationError

PIPELINE_CLASSES: Final = ("StableDiffusionPipeline",)

VARIANTS: Final = (None, "fp16", "bf16")
"""Of weight files, as in `model.fp16.safetensors`; the first that is there is loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A folder within a model's.

    class_name: in `model_index.json`; empty for any. files: that have to be there, each with others
    that may stand in for it. weights: what the names of its weight files begin with, as safetensors
    and as .bin; none for a part without.
    """

    class_name: str = ""
    files: tuple[tuple[tuple[str, ...], ...], ...]
    weights: tuple[str, str] | None = None


_CONFIG: Final = ((("config.json",),),)
_DIFFUSERS_WEIGHTS: Final = ("diffusion_pytorch_model", "diffusion_pytorch_model")
_PARTS: Final[Mapping[str, _Part]] = {
    "unet": _Part(class_name="UNet2DConditionModel", files=_CONFIG, weights=_DIFFUSERS_WEIGHTS),
    "vae": _Part(class_name="AutoencoderKL", files=_CONFIG, weights=_DIFFUSERS_WEIGHTS),
    "text_encoder": _Part(
        class_name="CLIPTextModel", files=_CONFIG, weights=("model", "pytorch_model")
    ),
    "tokenizer": _Part(
        files=(
            (("tokenizer_config.json",),),
            (("vocab.json", "merges.txt"), ("tokenizer.json",)),
        )
    ),
    "scheduler": _Part(files=((("scheduler_config.json",),),)),
}

_DTYPE_BYTES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}
"""Of tensors that can be loaded; whole numbers are positions of tokens. Others are quantized."""

_LENGTH_BYTES: Final = 8  # of a safetensors header's own length, in front of it
_LFS_MARK: Final = b"version https://git-lfs"
_NUM_SAMPLES, _SAMPLE_BYTES = 16, 4096
"""Of each weight file that go into the digest: trainings of one model differ in nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """The files that a part's weights are loaded from. variant: None for none."""

    variant: str | None
    paths: tuple[Path, ...]


def check_model_folder(folder: Path, parts: Sequence[str] = tuple(_PARTS)) -> None:
    """Return if the folder can be served, as far as can be told without loading it.

    Raises:
        ConfigurationError: Says in one sentence what is wrong: no such folder, another kind of
            pipeline, a file that is missing, cut off or damaged, weights of an unknown dtype.
    """
    index = read_json(folder / "model_index.json")
    class_name = index.get("_class_name")
    if class_name not in PIPELINE_CLASSES:
        raise ConfigurationError(
            f"{folder / 'model_index.json'} names the pipeline {class_name!r}; "
            f"it should be {' or '.join(PIPELINE_CLASSES)}"
        )
    for name in parts:
        _check_part(folder / name, _PARTS[name], index.get(name))


def model_digest(folder: Path) -> str:
    """What tells models apart whose folders have one name; the same on every machine.

    Raises:
        ConfigurationError: As `check_model_folder`.
    """
    digest = hashlib.sha256()
    for path in _identifying_files(folder):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        try:
            for piece in _identifying_bytes(path):
                digest.update(hashlib.sha256(piece).digest())
        except OSError as error:
            raise _unreadable(path, error) from error
    return digest.hexdigest()[:16]


def find_weights(folder: Path, part: str) -> WeightFiles:
    """The weight files of a part: the plain ones if they are there, else a variant's.

    Raises:
        ConfigurationError: There are none, or not all that their index names.
    """
    stems = _PARTS[part].weights
    assert stems is not None
    for variant in VARIANTS:
        infix = f".{variant}" if variant else ""
        for stem, ending in zip(stems, ("safetensors", "bin"), strict=True):
            single = folder / part / f"{stem}{infix}.{ending}"
            if single.is_file():
                return WeightFiles(variant=variant, paths=(single,))
            index = folder / part / f"{stem}.{ending}.index{infix}.json"
            if index.is_file():
                return WeightFiles(variant=variant, paths=_shards(index))
    raise ConfigurationError(
        f"{folder / part} has no weights: {stems[0]}.safetensors or a variant of it is missing"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file's content.

    Raises:
        ConfigurationError: It is missing, can't be read, or is no JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigurationError(
            f"{path} is missing; a model is a diffusers folder with model_index.json, "
            f"{', '.join(_PARTS)}"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} should hold a JSON object")
    return content


def _check_part(folder: Path, part: _Part, entry: Any) -> None:
    """entry: of `model_index.json`: the library and the class."""
    class_name: str | None
    match entry:
        case [_, str(class_name)]:
            pass
        case _:
            class_name = None
    if class_name is None or part.class_name not in ("", class_name):
        raise ConfigurationError(
            f"{folder.parent / 'model_index.json'} names {class_name!r} as {folder.name}; "
            f"it should be {part.class_name or 'a class'}"
        )
    for sets in part.files:
        if not any(all((folder / name).is_file() for name in one) for one in sets):
            names = " or ".join(" and ".join(one) for one in sets)
            raise ConfigurationError(f"{folder / names} is missing")
    for path in folder.glob("*.json"):
        read_json(path)
    if part.weights:
        for path in find_weights(folder.parent, folder.name).paths:
            if path.suffix == ".safetensors":
                _check_safetensors(path)


def _check_safetensors(path: Path) -> None:
    header, num_data_bytes = _read_header(path)
    end = 0
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = tensor["dtype"], tensor["shape"]
            start, stop = tensor["data_offsets"]
            if dtype not in _DTYPE_BYTES:
                raise ConfigurationError(
                    f"{path} holds {name} as {dtype}; "
                    f"weights should be one of {', '.join(_DTYPE_BYTES)}"
                )
            is_sane = stop - start == math.prod(shape) * _DTYPE_BYTES[dtype] and start >= 0
        except (KeyError, TypeError, ValueError):
            is_sane = False
        if not is_sane:
            raise ConfigurationError(f"{path} is damaged: its header is wrong about {name}")
        end = max(end, stop)
    if end != num_data_bytes:
        raise ConfigurationError(
            f"{path} is damaged: it holds {num_data_bytes} bytes of weights "
            f"where its header names {end}"
        )


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and the number of bytes behind it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length_bytes = file.read(_LENGTH_BYTES)
            if _LFS_MARK.startswith(length_bytes) and length_bytes:
                raise ConfigurationError(
                    f"{path} is a pointer of Git LFS and not the file itself; fetch it"
                )
            length = int.from_bytes(length_bytes, "little")
            if not 0 < length <= size - _LENGTH_BYTES:
                raise ConfigurationError(f"{path} is no safetensors file, or it is cut off")
            header = json.loads(file.read(length))
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is no safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise ConfigurationError(f"{path} is no safetensors file")
    return header, size - _LENGTH_BYTES - length


def _shards(index: Path) -> tuple[Path, ...]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigurationError(f"{index} should have a weight_map")
    paths = tuple(index.parent / Path(str(name)).name for name in sorted(set(weight_map.values())))
    for path in paths:
        if not path.is_file():
            raise ConfigurationError(f"{path} is missing, which {index.name} names")
    return paths


def _identifying_files(folder: Path) -> Iterator[Path]:
    yield folder / "model_index.json"
    for name, part in _PARTS.items():
        for sets in part.files:
            names = [file for one in sets for file in one]
            yield from (path for path in (folder / name / one for one in names) if path.is_file())
        if part.weights:
            yield from find_weights(folder, name).paths


def _identifying_bytes(path: Path) -> Iterator[bytes]:
    """All of a configuration; of weights the header, the size and samples."""
    if path.suffix not in (".safetensors", ".bin"):
        yield path.read_bytes()
        return
    size = path.stat().st_size
    yield str(size).encode()
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            yield file.read(min(length, size))
        for number in range(_NUM_SAMPLES):
            file.seek(number * max(size - _SAMPLE_BYTES, 0) // (_NUM_SAMPLES - 1))
            yield file.read(_SAMPLE_BYTES)


def _unreadable(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(f"{path} can't be read: {error.strerror}")
