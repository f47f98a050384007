"""Profiles as text: versioned JSON with the fields of `Profile`, those left out that are default.

{
  "format": "synerdiff-profile", "version": 2,
  "model_id": "emoji", "device": "cpu", "dtype": "bfloat16", "threads": 2,
  "slots": [
    {"key": "128x128", "kind": {"unet_threads": 2}, "step_ms": {"1": 9.0, "2": 11.0}},
    {"key": "128x128", "kind": {"unet_threads": 1, "vae_threads": 1, "chunks": 2},
     "step_ms": {"1": 14.0, "2": 17.0}, "chunks_ms": {"1": 9.0, "2": 9.5}, "spread": 0.05}
  ],
  "decodes": [{"key": "128x128", "threads": 2, "chunk_ms": [5.0, 5.1, 4.9, 5.0]}],
  "notes": {"cpu": "...", "torch": "...", "at": "..."}
}
"""

from __future__ import annotations

import json

from cattrs.errors import BaseValidationError
from cattrs.preconf.json import make_converter

from services.scheduler.devices.profile import Profile
from shared.errors import ConfigurationError

FORMAT = "synerdiff-profile"
VERSION = 2

_converter = make_converter(omit_if_default=True, detailed_validation=False)


def format_profile(profile: Profile) -> str:
    """Return the profile as JSON text, the same for the same profile."""
    content = {"format": FORMAT, "version": VERSION, **_converter.unstructure(profile)}
    return json.dumps(content, indent=1) + "\n"


def parse_profile(text: str, *, name: str = "the profile") -> Profile:
    """Return the profile that `format_profile` wrote, or a person.

    Raises:
        ConfigurationError: It is not JSON, not a profile of this version, or lacks something.
    """
    try:
        content = json.loads(text)
        if (content.get("format"), content.get("version")) != (FORMAT, VERSION):
            raise ConfigurationError(f"{name} is no {FORMAT} of version {VERSION}")
        return _converter.structure(content, Profile)
    except (ValueError, KeyError, TypeError, AttributeError, BaseValidationError) as error:
        raise ConfigurationError(f"{name} can't be read: {error!r}") from error
