"""Settings come from the environment, and bad ones are named."""

from __future__ import annotations

import pytest

from shared.errors import ConfigurationError
from shared.settings import UnetWorkerSettings, VaeWorkerSettings, load_settings


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
