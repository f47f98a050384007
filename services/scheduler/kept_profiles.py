"""Profiles that were measured while serving, in Redis, so that the next scheduler has them."""

from __future__ import annotations

from typing import Any, cast

from redis.asyncio import Redis

from services.scheduler.profile import Profile
from services.scheduler.profile_file import format_profile, parse_profile
from shared import keys
from shared.errors import ConfigurationError
from shared.logs import get_logger
from shared.streams import Writer

KEEP_S = 7 * 86_400
"""After a week without a new one they are measured again: devices and their neighbours change."""

log = get_logger()


class KeptProfiles:
    """One for each model, dtype, device and number of threads.

    Args:
        redis: The connection; the caller owns it.
        writer: Names the epoch.
    """

    def __init__(self, redis: Redis, writer: Writer) -> None:
        self._redis = redis
        self._writer = writer

    async def read(self) -> tuple[Profile, ...]:
        """All of them but those that this version can't read."""
        found = await cast("Any", self._redis.hgetall(keys.PROFILES))
        profiles = []
        for name, text in sorted(found.items()):
            try:
                profiles.append(parse_profile(text.decode(), name=name.decode()))
            except (ConfigurationError, ValueError, RecursionError) as error:
                log.warning("a profile is left out", error=str(error))
        return tuple(profiles)

    async def keep(self, profile: Profile) -> None:
        """Put one in the place of the last."""
        name = f"{profile.model_id}/{profile.dtype}/{profile.device}/{profile.threads}"
        await self._writer.write(
            ("HSET", keys.PROFILES, name, format_profile(profile)),
            ("EXPIRE", keys.PROFILES, KEEP_S),
        )
