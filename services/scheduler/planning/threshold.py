"""The threshold: how much of the UNet's time decodes may take, moved with the two queues.

`value` is θ in [min_value, 1]: over a window, slots may together take at most 1/θ of the time that
the same steps would take alone. At 1 decodes ride on what overlap and skipping save.

A stage's *stretch* is the predicted wait of a newcomer ahead of it over its own service time
(Little's law: what is ahead, over the rate at which it goes). The rule is a step with hysteresis:
where the UNet's stretch is well above the decoder's, θ goes up one step and decodes yield; the
other way round it goes down; in between it rests. After a step it rests for some slots, so that
the queues can answer before the next one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdRule:
    """Limits and gains, settled by experiment (docs/decisions/0014-threshold.md)."""

    min_value: float = 0.2
    max_value: float = 0.85
    """Below 1, where decodes come in bursts whenever the rule relents: twice the P99 decode latency
    and no more throughput."""
    first_value: float = 0.8
    step: float = 0.05
    """Of θ."""
    smoothing: float = 0.1
    """Share of a new slot's stretches, which are spiky where decodes are few."""
    hysteresis: float = 1.5
    """The stretches count as different when one exceeds the other by this factor."""
    rest_slots: int = 8
    """Slots between two steps."""
    is_adaptive: bool = True
    is_reversed: bool = False
    """Whether it goes in the other direction, for experiments."""

    def __post_init__(self) -> None:
        """Refuse limits that can't hold.

        Raises:
            ValueError: They are not 0 < min <= first <= max <= 1, or a gain is out of range.
        """
        if not 0 < self.min_value <= self.first_value <= self.max_value <= 1:
            raise ValueError("thresholds must keep 0 < min <= first <= max <= 1")
        if self.step <= 0 or self.hysteresis < 1 or self.rest_slots < 1:
            raise ValueError("step > 0, hysteresis >= 1 and rest_slots >= 1 are needed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretches:
    """Predicted wait over own service time, of a request that comes to a stage now."""

    unet: float
    vae: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """θ on its way."""

    value: float
    num_slots: int = 0
    """Since it moved."""
    stretches: Stretches = Stretches(unet=0.0, vae=0.0)
    """The smoothed ones that it was last judged by."""

    def after_slot(self, rule: ThresholdRule, stretches: Stretches) -> Threshold:
        """Return the threshold after one more slot."""
        last, share = self.stretches, rule.smoothing
        stretches = Stretches(
            unet=last.unet + share * (stretches.unet - last.unet),
            vae=last.vae + share * (stretches.vae - last.vae),
        )
        rested = replace(self, num_slots=self.num_slots + 1, stretches=stretches)
        if not rule.is_adaptive or rested.num_slots < rule.rest_slots:
            return rested
        # One is added to both: below one service time of waiting there is nothing to balance.
        ratio = (1 + stretches.unet) / (1 + stretches.vae)
        direction = (ratio > rule.hysteresis) - (ratio * rule.hysteresis < 1)
        if rule.is_reversed:
            direction = -direction
        value = min(max(self.value + direction * rule.step, rule.min_value), rule.max_value)
        if value == self.value:
            return rested
        return Threshold(value=value, num_slots=0, stretches=stretches)
