"""Settings come from the environment, bad ones are named, and secrets are not logged."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import ConfigurationError
from shared.settings import (
    ServiceSettings,
    UnetWorkerSettings,
    VaeWorkerSettings,
    cgroup_quota,
    load_settings,
)


def test_sizes_to_warm_up_are_read_width_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNERDIFF_WARM_UP_SIZES", "256x128 512x512")
    assert load_settings(UnetWorkerSettings).sizes_to_warm_up == ((128, 256), (512, 512))


def test_no_further_sizes_are_warmed_up_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SYNERDIFF_WARM_UP_SIZES", raising=False)
    assert load_settings(VaeWorkerSettings).sizes_to_warm_up == ()


@pytest.mark.parametrize("sizes", ["256", "256x", "256x256,512x512", "big"])
def test_a_malformed_list_of_sizes_stops_the_start_and_is_named(
    monkeypatch: pytest.MonkeyPatch, sizes: str
) -> None:
    monkeypatch.setenv("SYNERDIFF_WARM_UP_SIZES", sizes)
    with pytest.raises(ConfigurationError, match="SYNERDIFF_WARM_UP_SIZES"):
        load_settings(UnetWorkerSettings)


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({}, 8),
    ],
)
def test_threads_follow_the_quota_of_either_version_of_cgroups(
    tmp_path: Path, files: dict[str, str], cpus: int
) -> None:
    (tmp_path / "cpu").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert cgroup_quota(8, tmp_path) == cpus


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (
            "rediss://:s3cret@redis:6379/0?ssl_ca_certs=/ca",
            "rediss://redis:6379/0?ssl_ca_certs=/ca",
        ),
        ("redis://user:s3cret@redis/0", "redis://redis/0"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
    ],
)
def test_a_password_is_not_logged(url: str, shown: str) -> None:
    settings = ServiceSettings(redis_url=url)
    assert settings.redis_url == url
    assert settings.model_dump(mode="json")["redis_url"] == shown
