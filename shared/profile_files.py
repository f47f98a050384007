"""Where profiles lie, and how their model's decodes are to be cut: what a worker takes from one.

The rest of a profile is the scheduler's (`services.scheduler.devices.profile_file`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from shared.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkGranularity:
    """How a decode is cut.

    num_chunks: at most. max_strip_fraction: layers that cost more than this share of a decode are
    cut into row strips; 0 cuts along the layers only.
    """

    num_chunks: int = 4
    max_strip_fraction: float = 0.0


def profile_paths(path: Path) -> list[Path]:
    """The file itself, or every JSON file of a folder; none where there is neither."""
    if path.is_dir():
        return sorted(path.glob("*.json"))
    return [path] if path.is_file() else []


def find_granularity(
    path: Path, *, model_id: str, device: str, dtype: str
) -> ChunkGranularity | None:
    """By the first profile there of that model, device ("cpu" or "cuda") and dtype that says.

    Raises:
        ConfigurationError: A file can't be read.
    """
    for file in profile_paths(path):
        try:
            content = json.loads(file.read_text())
            fields = content.get("granularity")
            found = (content.get("model_id"), content.get("device"), content.get("dtype"))
            if fields and found == (model_id, device, dtype):
                return parse_granularity(fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(f"{file} can't be read: {error!r}") from error
    return None


def parse_granularity(fields: dict[str, float]) -> ChunkGranularity:
    """From a profile's JSON.

    Raises:
        KeyError, TypeError, ValueError: A field is missing or no number.
    """
    return ChunkGranularity(
        num_chunks=int(fields["num_chunks"]),
        max_strip_fraction=float(fields["max_strip_fraction"]),
    )
