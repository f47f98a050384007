"""Settings come from the environment, bad ones are named, and secrets are not logged."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import ConfigurationError
from shared.settings import (
    GatewaySettings,
    SchedulerSettings,
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


@pytest.mark.parametrize(
    ("kind", "name", "value", "wanted"),
    [
        (GatewaySettings, "PORT", "http", "an integer from 0 to 65535"),
        (GatewaySettings, "PORT", "70000", "an integer from 0 to 65535"),
        (GatewaySettings, "REQUEST_TIMEOUT_S", "0", "a number above 0"),
        (GatewaySettings, "REQUEST_TIMEOUT_S", "inf", "a number above 0"),
        (GatewaySettings, "MAX_WAIT_S", "-1", "a number of at least 0"),
        (GatewaySettings, "MAX_OPEN_REQUESTS", "0", "an integer of at least 1"),
        (GatewaySettings, "DEFAULT_GUIDANCE_SCALE", "nan", "a number from 0 to 50"),
        (GatewaySettings, "MAX_GUIDANCE_SKIP", "all", "off, balanced or fast"),
        (GatewaySettings, "PUBLIC_URL", "example.org", "an address that begins with http://"),
        (GatewaySettings, "PUBLIC_URL", "https://a b", "an address that begins with http://"),
        (ServiceSettings, "REDIS_URL", "localhost:6379", "begins with redis://, rediss:// or unix"),
        (ServiceSettings, "LOG_FORMAT", "xml", "text or json"),
        (SchedulerSettings, "THRESHOLD_MIN", "0", "a number above 0 and at most 1"),
        (UnetWorkerSettings, "SPLIT_ROWS", "perhaps", "true or false"),
        (UnetWorkerSettings, "WARM_UP_SIZES", "big", 'as in "256x256 512x768", or empty'),
        (VaeWorkerSettings, "NUM_CHUNKS", "many", "an integer from 1 to 64"),
        (VaeWorkerSettings, "WORKER_ID", "a b", "letters, digits"),
    ],
)
def test_a_wrong_value_is_answered_with_what_it_should_be(
    monkeypatch: pytest.MonkeyPatch, kind: type[ServiceSettings], name: str, value: str, wanted: str
) -> None:
    monkeypatch.setenv(f"SYNERDIFF_{name}", value)
    with pytest.raises(ConfigurationError) as caught:
        load_settings(kind)
    assert str(caught.value).startswith(f"SYNERDIFF_{name}='{value}' should be ")
    assert wanted in str(caught.value)


@pytest.mark.parametrize(("timeout_s", "wait_s"), [(15.0, 7.5), (600.0, 60.0)])
def test_a_request_waits_for_its_start_well_below_its_timeout(
    timeout_s: float, wait_s: float
) -> None:
    assert GatewaySettings(request_timeout_s=timeout_s).wait_limit_s == wait_s
    assert GatewaySettings(request_timeout_s=timeout_s, max_wait_s=0.0).wait_limit_s == 0.0
