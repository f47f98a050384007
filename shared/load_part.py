"""Loads a part of a model's folder with all of its weights, or says what is wrong with them.

Libraries fill in what a file lacks with random numbers, and load numbers that are none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shared.errors import ConfigurationError
from shared.model_folder import find_weights

_NUM_NAMED = 3


def load_part(folder: Path, part: str, kind: Any, dtype: torch.dtype) -> Any:
    """The part, an object of the class `kind` of diffusers or transformers, on the CPU.

    Nothing is downloaded. Of a part without plain weight files a variant's are loaded.

    Raises:
        ConfigurationError: It can't be loaded, its weights are not those that its configuration
            asks for, or some of them are no finite numbers in that dtype.
    """
    weights = find_weights(folder, part)
    dtype_word = "dtype" if kind.__module__.startswith("transformers") else "torch_dtype"
    try:
        module, report = kind.from_pretrained(
            folder / part,
            variant=weights.variant,
            local_files_only=True,
            output_loading_info=True,
            **{dtype_word: dtype},
        )
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise ConfigurationError(f"{folder / part} can't be loaded: {error}") from error
    # A text encoder may lie in one file with what isn't needed.
    unexpected = report["unexpected_keys"] if part != "text_encoder" else ()
    for names, complaint in (
        (report["missing_keys"], "lacks weights that its configuration asks for"),
        (report["mismatched_keys"], "has weights of other shapes than its configuration asks for"),
        (unexpected, "has weights that its configuration knows nothing of"),
        (_not_finite(module), f"has weights that are no finite numbers in {dtype}"),
    ):
        if names:
            raise ConfigurationError(f"{folder / part} {complaint}: {_some_of(names)}")
    return module


def _not_finite(module: torch.nn.Module) -> list[str]:
    return [
        name
        for name, one in module.state_dict().items()
        if one.is_floating_point() and not torch.isfinite(one).all()
    ]


def _some_of(names: Any) -> str:
    ordered = sorted(str(name) for name in names)
    more = len(ordered) - _NUM_NAMED
    return ", ".join(ordered[:_NUM_NAMED]) + (f" and {more} more" if more > 0 else "")
