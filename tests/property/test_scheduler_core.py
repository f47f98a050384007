"""The core under any order of events: nothing lost, nothing twice, limits kept, always drains."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import inf, nan
from typing import cast

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from scheduler_world import POISON, World, make_request, make_worker

from services.scheduler.events import Event
from services.scheduler.liveness import Patience
from services.scheduler.policies import MAX_SLOTS_IN_FLIGHT, POLICY_NAMES
from services.scheduler.profile import DecodeTiming, Profile, SlotKind, SlotTiming
from services.scheduler.skipping import skip_credits
from services.scheduler.state import Stage
from shared import messages

PATIENCE = Patience(floor_s=3.0, first_use_s=6.0)

PROFILE = Profile(
    model_id="m",
    device="cpu",
    dtype="float32",
    threads=2,
    slots=(
        SlotTiming(
            key="64x64",
            kind=SlotKind(unet_threads=2),
            step_ms={1: 10.0, 2: 12.0, 4: 20.0, 8: 40.0},
        ),
        SlotTiming(
            key="128x128",
            kind=SlotKind(unet_threads=2),
            step_ms={1: 10.0, 2: 11.0, 8: 14.0, 16: 16.0},
        ),
        *(
            SlotTiming(
                key="64x64",
                kind=SlotKind(unet_threads=1, vae_threads=1, chunks=chunks),
                step_ms={1: 13.0, 8: 48.0},
                chunks_ms={1: 8.0 * chunks, 8: 9.0 * chunks},
            )
            for chunks in (1, 2, 4)
        ),
    ),
    decodes=(DecodeTiming(key="64x64", threads=2, chunk_ms=(5.0,) * 4),),
)

PROFILES = (PROFILE, replace(PROFILE, model_id="n"))
"""64x64 has a knee of 4 rows, 128x128 one of 16."""

LOSABLE = (
    messages.AdmitRequest,
    messages.DenoiseSlot,
    messages.DecodeLatents,
    messages.GrantChunks,
)

ANSWERS = (
    messages.RequestAdmitted,
    messages.SlotDenoised,
    messages.LatentsFinished,
    messages.ChunksDecoded,
)

ODD: tuple[Event, ...] = (
    replace(make_request("odd"), priority=cast("int", inf)),
    replace(make_request("odd"), submitted_at=nan),
    make_request("odd", side=-64),
    make_request("odd", steps=0),
    messages.WorkerRegistered(worker=replace(make_worker("unet", "unet-0", "odd"), step_ms={})),
    messages.WorkerRegistered(worker=replace(make_worker("vae", "vae-0", "odd"), num_chunks=0)),
    messages.DenoiseSlot(epoch=1, seq=1, kind="alone", threads=1, rows=()),
)


class SchedulerMachine(RuleBasedStateMachine):
    world: World

    @initialize(
        policy=st.sampled_from([*POLICY_NAMES, "synerdiff", "synerdiff"]),
        is_profiled=st.booleans(),
    )
    def begin(self, policy: str, is_profiled: bool) -> None:
        self.world = World(
            policy=policy, profiles=PROFILES if is_profiled else (), patience=PATIENCE
        )
        self.world.start_worker("unet", "unet-0")
        self.world.start_worker("vae", "vae-0")
        self.world.start_worker("unet", "unet-n", model="n")
        self.world.start_worker("vae", "vae-n", model="n", group="other")
        self.submitted = 0
        self.overdue_since: dict[tuple[str, ...], int] = {}
        self.calm_since_blow = 0

    @rule(
        steps=st.integers(1, 6),
        guidance=st.sampled_from([1.0, 5.0]),
        side=st.sampled_from([64, 128]),
        priority=st.integers(0, 2),
        guidance_skip=st.sampled_from(["off", "balanced", "fast"]),
        deadline_ms=st.sampled_from([0, 0, 1, 5_000]),
        owner=st.sampled_from(["", "a", "b"]),
        sampler=st.sampled_from(["ddim", "ddim", "unmovable"]),
        model=st.sampled_from(["m", "m", "n"]),
    )
    def submit(  # noqa: PLR0917  as the strategies above
        self,
        steps: int,
        guidance: float,
        side: int,
        priority: int,
        guidance_skip: str,
        deadline_ms: int,
        owner: str,
        sampler: str,
        model: str,
    ) -> None:
        request_id = f"r{self.submitted}"
        self.submitted += 1
        self.world.submit(
            make_request(
                request_id,
                steps=steps,
                guidance_scale=guidance,
                side=side,
                priority=priority,
                submitted_at=self.world.now,
                guidance_skip=guidance_skip,
                deadline_ms=deadline_ms,
                owner=owner,
                sampler=sampler,
                model=model,
            )
        )

    @rule(steps=st.integers(1, 3))
    def submit_what_makes_planning_raise(self, steps: int) -> None:
        request_id = f"{POISON}{self.submitted}"
        self.submitted += 1
        self.world.submit(make_request(request_id, steps=steps, submitted_at=self.world.now))

    @rule(event=st.sampled_from(ODD))
    def something_odd_comes(self, event: Event) -> None:
        num_parked = len(self.world.parked)
        self.world.feed(event)
        assert len(self.world.parked) == num_parked + 1
        assert self.world.parked[-1].event == event

    @precondition(lambda self: len(self.world.lost_kinds) < 2)
    @rule(kind=st.sampled_from(LOSABLE))
    def a_message_will_be_lost(self, kind: type[messages.Message]) -> None:
        self.world.lose_next(kind)

    @precondition(lambda self: self.world.mail and isinstance(self.world.mail[0], ANSWERS))
    @rule()
    def an_answer_is_lost(self) -> None:
        self.world.mail.popleft()

    @precondition(lambda self: self.calm_since_blow > 1)
    @precondition(lambda self: self.hangable())
    @rule(data=st.data(), seconds=st.integers(0, 12))
    def a_worker_hangs(self, data: st.DataObject, seconds: int) -> None:
        self.calm_since_blow = 0
        self.world.hang(data.draw(st.sampled_from(self.hangable())))
        for _ in range(seconds):
            self.world.tick()
            self.every_answer_has_its_time()

    @precondition(lambda self: self.hanging())
    @rule(data=st.data())
    def a_worker_goes_on(self, data: st.DataObject) -> None:
        self.world.go_on(data.draw(st.sampled_from(self.hanging())))

    @precondition(lambda self: self.calm_since_blow > 1)
    @precondition(lambda self: self.hangable())
    @rule(data=st.data())
    def a_worker_lapses(self, data: st.DataObject) -> None:
        self.calm_since_blow = 0
        self.world.lapse(data.draw(st.sampled_from(self.hangable())))

    @precondition(lambda self: self.world.lapsed)
    @rule(data=st.data())
    def a_worker_comes_back(self, data: st.DataObject) -> None:
        self.world.come_back(data.draw(st.sampled_from(sorted(self.world.lapsed))))

    def hangable(self) -> list[str]:
        """Workers that do well and stay."""
        return sorted(
            name
            for name, worker in (self.world.unets | self.world.vaes).items()
            if not (worker.hangs or worker.is_draining or name in self.world.lapsed)
        )

    def hanging(self) -> list[str]:
        workers = self.world.unets | self.world.vaes
        return sorted(name for name, worker in workers.items() if worker.hangs)

    @precondition(lambda self: self.world.mail)
    @rule(twice=st.booleans())
    def deliver(self, twice: bool) -> None:
        self.world.deliver(twice=twice)

    @rule(rounds=st.integers(1, 6))
    def advance(self, rounds: int) -> None:
        """Some rounds in which all goes well, so that requests get far before the next blow."""
        self.calm_since_blow += rounds
        for _ in range(rounds):
            self.world.settle()
            for name in self.running():
                self.world.run_slot(name)

    def running(self) -> list[str]:
        return sorted(
            name for name, unet in self.world.unets.items() if unet.slots and not unet.hangs
        )

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def run_slot(self, data: st.DataObject) -> None:
        self.world.run_slot(data.draw(st.sampled_from(self.running())))

    @precondition(lambda self: any(self.world.decodable(name) for name in self.world.vaes))
    @rule(data=st.data())
    def decode(self, data: st.DataObject) -> None:
        pairs = [(vae, one) for vae in self.world.vaes for one in self.world.decodable(vae)]
        self.world.decode(*data.draw(st.sampled_from(pairs)))

    @precondition(lambda self: self.world.open_requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.world.cancel(data.draw(st.sampled_from(sorted(self.world.open_requests))))

    @precondition(lambda self: self.calm_since_blow > 3)
    @rule(kind=st.sampled_from(["unet", "vae"]), number=st.integers(0, 1), off=st.booleans())
    def start_worker(self, kind: str, number: int, off: bool) -> None:
        self.calm_since_blow = 0
        self.world.start_worker(kind, f"{kind}-{number}", group="other" if off else "g")

    @precondition(lambda self: self.calm_since_blow > 3)
    @precondition(lambda self: self.world.unets or self.world.vaes)
    @rule(data=st.data())
    def kill_worker(self, data: st.DataObject) -> None:
        self.calm_since_blow = 0
        names = sorted([*self.world.unets, *self.world.vaes])
        self.world.kill_worker(data.draw(st.sampled_from(names)))

    @precondition(lambda self: self.calm_since_blow > 1)
    @precondition(lambda self: self.hangable())
    @rule(data=st.data())
    def drain_worker(self, data: st.DataObject) -> None:
        self.calm_since_blow = 0
        self.world.drain_worker(data.draw(st.sampled_from(self.hangable())))

    @precondition(lambda self: self.calm_since_blow > 3)
    @rule()
    def restart_scheduler(self) -> None:
        self.calm_since_blow = 0
        self.world.restart_scheduler()

    @rule()
    def tick(self) -> None:
        self.world.tick()

    @rule(factor=st.sampled_from([0.5, 1.0, 3.0]))
    def the_device_changes_its_speed(self, factor: float) -> None:
        self.world.drift = factor

    @invariant()
    def slots_keep_their_limits(self) -> None:
        core = self.world.core
        for unet in core.unets.values():
            assert len(unet.slots) <= MAX_SLOTS_IN_FLIGHT
            for slot in unet.slots:
                known = [
                    (request, row)
                    for row in slot.rows
                    if (request := core.requests.get(row.request_id))
                ]
                assert len({request.batch_key for request, _ in known}) <= 1
                knee = unet.profile.knee(slot.key.size)
                assert sum(request.rows - row.skip for request, row in known) <= max(2, knee)
                assert len({row.request_id for row in slot.rows}) == len(slot.rows)

    @invariant()
    def every_open_request_is_in_one_place(self) -> None:
        core = self.world.core
        held = [name for vae in core.vaes.values() for name in vae.decodes]
        assert len(held) == len(set(held))
        decoding = {r.request_id for r in core.requests.values() if r.stage is Stage.DECODING}
        assert set(held) == decoding
        for request in core.requests.values():
            if request.stage in {Stage.ENCODING, Stage.DENOISING}:
                assert request.unet in core.unets
            carried = sum(
                row.request_id == request.request_id and row.attempt == request.attempt
                for unet in core.unets.values()
                if unet.info.incarnation == request.unet
                for slot in unet.slots
                for row in slot.rows
            )
            if request.stage is Stage.DENOISING:
                assert carried == request.slots_in_flight
                assert request.done_step <= request.next_step <= request.num_forwards

    @invariant()
    def no_step_is_in_two_slots_in_flight(self) -> None:
        for unet in self.world.core.unets.values():
            rows = [(row.request_id, row.attempt) for slot in unet.slots for row in slot.rows]
            steps = [
                (row.request_id, row.attempt, row.step_index)
                for slot in unet.slots
                for row in slot.rows
            ]
            assert len(set(steps)) == len(steps)
            assert max(Counter(rows).values(), default=0) <= len(unet.slots)

    @invariant()
    def an_overdue_decode_waits_for_a_few_slots_at_most(self) -> None:
        """However tight the threshold: one gap for each decode ahead of it, a slot between them."""
        core = self.world.core
        overdue = {
            (unet.info.incarnation, request.request_id, request.attempt, request.vae): unet
            for unet in core.unets.values()
            for request in core.requests.values()
            if request.stage is Stage.DECODING
            and not request.granted_chunks
            and core.vaes[request.vae].info.device_group == unet.info.device_group
            and self.world.now - request.latents_at > self.world.options.max_decode_wait_s
        }
        self.overdue_since = {
            name: self.overdue_since.get(name, unet.num_slots) for name, unet in overdue.items()
        }
        for name, unet in overdue.items():
            assert unet.num_slots - self.overdue_since[name] <= 4 + 2 * len(overdue)

    @invariant()
    def a_plan_keeps_the_threshold_or_says_that_none_does(self) -> None:
        for unet in self.world.core.unets.values():
            rule = self.world.options.rule
            outlook = unet.outlook
            if outlook is None:
                continue
            assert rule.min_value <= outlook.theta <= rule.max_value
            if outlook.is_feasible:
                assert outlook.planned_ms <= outlook.alone_ms / outlook.theta + 1e-6

    @invariant()
    def skips_stay_within_each_request_s_budget(self) -> None:
        for request in self.world.core.requests.values():
            if request.num_skipped:
                assert request.is_guided
                assert request.request.parameters.guidance_skip != "off"
                unet = self.world.core.unets.get(request.unet)
                if unet and request.stage is Stage.DENOISING:
                    assert skip_credits(request, unet.profile) >= 0
                    assert request.num_skipped <= 0.7 * request.num_forwards + 0.5

    @invariant()
    def every_answer_has_its_time(self) -> None:
        """Past it a worker is suspect, and what it owed is elsewhere. Ticks are a second apart."""
        core, now = self.world.core, self.world.now
        bound_s = max(PATIENCE.floor_s, PATIENCE.first_use_s) + 1
        for unet in core.unets.values():
            assert not (unet.is_suspect and unet.slots)
            for slot in unet.slots:
                assert now - max(slot.sent_at, unet.answered_at) <= bound_s
        num_open = len(core.requests)
        for request in core.requests.values():
            is_owed = request.stage is Stage.ENCODING or (
                request.stage is Stage.DECODING and core.vaes[request.vae].owes(request)
            )
            if is_owed:
                assert now - request.asked_at <= bound_s * (num_open + 1)

    @invariant()
    def no_open_request_is_forgotten(self) -> None:
        assert set(self.world.open_requests) <= set(self.world.core.requests)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        for name in sorted(self.world.lapsed):
            self.world.come_back(name)
        for name in self.hanging():
            self.world.go_on(name)
        for model in ("m", "n"):
            self.world.start_worker("unet", f"unet-{'0' if model == 'm' else model}", model=model)
            self.world.start_worker("vae", f"vae-{'0' if model == 'm' else model}", model=model)
        self.world.run_until_quiet(max_rounds=1_500)
        assert len(self.world.final) == self.submitted
        assert not any(unet.held for unet in self.world.unets.values())
        assert not self.world.core.requests
        self.world.replay()


TestSchedulerCore = SchedulerMachine.TestCase
TestSchedulerCore.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
