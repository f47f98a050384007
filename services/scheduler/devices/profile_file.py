"""Profiles as text: readable, versioned JSON.

{
  "format": "synerdiff-profile", "version": 1,
  "model_id": "emoji", "device": "cpu", "dtype": "bfloat16", "threads": 2, "source": "measured",
  "notes": {"cpu": "...", "torch": "...", "at": "..."},
  "encode_ms": 12.0,
  "granularity": {"num_chunks": 4, "max_strip_fraction": 0.0},
  "slots": [
    {"key": "128x128", "unet_threads": 2, "vae_threads": 0, "chunks": 0,
     "step_ms": {"1": 9.0, "2": 11.0}, "spread": 0.03},
    {"key": "128x128", "unet_threads": 1, "vae_threads": 1, "chunks": 2,
     "step_ms": {"1": 14.0, "2": 17.0}, "chunks_ms": {"1": 9.0, "2": 9.5}, "spread": 0.05}
  ],
  "decodes": [
    {"key": "128x128", "threads": 2, "granularity": "4 chunks", "chunk_ms": [5.0, 5.1, 4.9, 5.0],
     "spread": 0.04}
  ],
  "skip_levels": {"balanced": {"rows_saved": 0.3, "psnr_mean_db": 37.0, "psnr_p5_db": 28.3}}
}

Durations are medians in milliseconds, `spread` is (75th - 25th percentile) / median, thread counts
of 0 are the library's default, rows are the names in `step_ms` and `chunks_ms`. Where there is no
`granularity` the workers' settings say how decodes are cut.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from services.scheduler.devices.profile import (
    ASSUMED_SKIP_LEVELS,
    DecodeTiming,
    Profile,
    SkipLevel,
    SlotKind,
    SlotTiming,
)
from shared.errors import ConfigurationError
from shared.profile_files import parse_granularity

FORMAT = "synerdiff-profile"
VERSION = 1


def format_profile(profile: Profile) -> str:
    """The profile as JSON text, the same for the same profile."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model_id": profile.model_id,
        "device": profile.device,
        "dtype": profile.dtype,
        "threads": profile.threads,
        "source": profile.source,
        "notes": dict(profile.notes),
        "encode_ms": profile.encode_ms,
        **({"granularity": asdict(profile.granularity)} if profile.granularity else {}),
        "slots": [_slot_fields(timing) for timing in profile.slots],
        "decodes": [
            {
                "key": timing.key,
                "threads": timing.threads,
                "granularity": timing.granularity,
                "chunk_ms": list(timing.chunk_ms),
                "spread": timing.spread,
            }
            for timing in profile.decodes
        ],
        "skip_levels": {
            name: {
                "rows_saved": level.rows_saved,
                "psnr_mean_db": level.psnr_mean_db,
                "psnr_p5_db": level.psnr_p5_db,
            }
            for name, level in profile.skip_levels.items()
        },
    }
    return json.dumps(content, indent=1) + "\n"


def parse_profile(text: str, *, name: str = "the profile") -> Profile:
    """The profile that `format_profile` wrote, or a person.

    Raises:
        ConfigurationError: It is not JSON, not a profile of this version, or lacks something.
    """
    try:
        content = json.loads(text)
        if (content.get("format"), content.get("version")) != (FORMAT, VERSION):
            raise ConfigurationError(f"{name} is no {FORMAT} of version {VERSION}")
        return _profile(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{name} can't be read: {error!r}") from error


def _slot_fields(timing: SlotTiming) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "key": timing.key,
        "unet_threads": timing.kind.unet_threads,
        "vae_threads": timing.kind.vae_threads,
        "chunks": timing.kind.chunks,
        "step_ms": {str(rows): ms for rows, ms in timing.step_ms.items()},
    }
    if timing.chunks_ms:
        fields["chunks_ms"] = {str(rows): ms for rows, ms in timing.chunks_ms.items()}
    return fields | {"spread": timing.spread}


def _profile(content: Mapping[str, Any]) -> Profile:
    levels = {
        name: SkipLevel(**{field: float(value) for field, value in level.items()})
        for name, level in content.get("skip_levels", {}).items()
    }
    granularity = content.get("granularity")
    return Profile(
        model_id=str(content["model_id"]),
        device=str(content["device"]),
        dtype=str(content["dtype"]),
        threads=int(content["threads"]),
        encode_ms=float(content.get("encode_ms", 0.0)),
        granularity=parse_granularity(granularity) if granularity else None,
        source=str(content.get("source", "measured")),
        notes={str(name): str(value) for name, value in content.get("notes", {}).items()},
        skip_levels=levels or dict(ASSUMED_SKIP_LEVELS),
        slots=tuple(
            SlotTiming(
                key=str(slot["key"]),
                kind=SlotKind(
                    unet_threads=int(slot["unet_threads"]),
                    vae_threads=int(slot.get("vae_threads", 0)),
                    chunks=int(slot.get("chunks", 0)),
                ),
                step_ms=_by_rows(slot["step_ms"]),
                chunks_ms=_by_rows(slot.get("chunks_ms", {})),
                spread=float(slot.get("spread", 0.0)),
            )
            for slot in content["slots"]
        ),
        decodes=tuple(
            DecodeTiming(
                key=str(decode["key"]),
                threads=int(decode["threads"]),
                granularity=str(decode.get("granularity", "")),
                chunk_ms=tuple(float(ms) for ms in decode["chunk_ms"]),
                spread=float(decode.get("spread", 0.0)),
            )
            for decode in content["decodes"]
        ),
    )


def _by_rows(durations: Mapping[str, Any]) -> dict[int, float]:
    return {int(rows): float(ms) for rows, ms in durations.items()}
