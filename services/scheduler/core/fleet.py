"""How workers come and go, and the profile that each UNet worker is planned by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.scheduler.core.cluster import Cluster
from services.scheduler.core.commands import ForgetWorker, KeepProfile
from services.scheduler.core.endings import Endings
from services.scheduler.core.outbox import Outbox
from services.scheduler.core.state import UnetWorker, VaeWorker
from services.scheduler.devices.choice import matching_profile, profile_in_short
from services.scheduler.devices.drift import Drift
from services.scheduler.devices.profile import Profile
from services.scheduler.planning.policy import Policy
from shared import messages
from shared.messages import WorkerInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The coming and going of workers, over a cluster."""

    cluster: Cluster
    policy: Policy
    """Sets a new UNet worker's first threshold."""
    endings: Endings
    """What becomes of a lost worker's requests."""
    outbox: Outbox

    def register(self, info: WorkerInfo) -> None:
        """Add a worker that is there; whoever had its name is not any more."""
        others = [worker.info for worker in self._workers()]
        for other in others:
            if (other.worker_id, other.kind) == (info.worker_id, info.kind):
                self.lose(other.incarnation, forgets=other.incarnation != info.incarnation)
        reason = other_model(info, [worker.info for worker in self._workers()])
        if reason:
            refuse = messages.RefuseWorker(epoch=self.cluster.epoch, reason=reason)
            self.outbox.send(info.incarnation, "control", refuse)
            return
        if info.kind == "unet":
            self.cluster.add_unet(
                UnetWorker(
                    info=info,
                    profile=profile_in_short(info, ()),
                    threshold=self.policy.first_threshold(),
                )
            )
        else:
            self.cluster.add_vae(VaeWorker(info=info))
        self._choose_profiles(info.device_group)
        self.outbox.ask_what_is_held(info.incarnation)

    def drain(self, incarnation: str) -> None:
        """Give nothing new to a worker that wants to leave."""
        if worker := self.cluster.worker(incarnation):
            self.cluster.drain(worker)
            leave = messages.LeaveWhenDone(epoch=self.cluster.epoch)
            self.outbox.send(incarnation, "control", leave)

    def lose(self, incarnation: str, *, forgets: bool) -> None:
        """Go on without a worker. forgets: all that Redis has of it is deleted."""
        worker = self.cluster.worker(incarnation)
        if worker:
            self.endings.lose_worker(incarnation)
            self._choose_profiles(worker.info.device_group)
        if forgets:
            self.outbox.add(ForgetWorker(incarnation=incarnation))

    def discard(self, incarnation: str) -> None:
        """Go on without a worker that can't be planned for; Redis goes on knowing it."""
        if self.cluster.worker(incarnation):
            self.endings.lose_worker(incarnation)

    def adopt(self, incarnation: str, profile: Profile) -> None:
        """Plan a UNet worker, and others that it fits, by what was measured with it."""
        self.cluster.set_drift(self.cluster.unets[incarnation], Drift())
        self.cluster.add_profile(profile)
        groups = {unet.info.device_group: None for unet in self.cluster.unets.values()}
        for device_group in groups:
            self._choose_profiles(device_group)
        self.outbox.add(KeepProfile(profile=profile))

    def _workers(self) -> list[UnetWorker | VaeWorker]:
        return [*self.cluster.unets.values(), *self.cluster.vaes.values()]

    def _choose_profiles(self, device_group: str) -> None:
        """Choose those of a device's UNet workers, now that who shares it has changed."""
        unets, vaes = self.cluster.unets_on(device_group), self.cluster.vaes_on(device_group)
        takes_turns = not all(worker.info.runs_side_by_side for worker in [*unets, *vaes])
        for unet in unets:
            own = [vae.info for vae in vaes if vae.info.model_id == unet.info.model_id]
            measured = matching_profile(self.cluster.profiles, unet.info)
            profile = measured or profile_in_short(unet.info, own)
            profile = profile.without_slots_beside() if takes_turns else profile
            self.cluster.use_profile(unet, profile, takes_turns=takes_turns)


def other_model(info: WorkerInfo, others: Sequence[WorkerInfo]) -> str:
    """Return why a worker can't join others: they have another model of its name; or nothing."""
    for other in others:
        has_other = other.model_id == info.model_id and other.model_digest != info.model_digest
        if has_other and other.model_digest and info.model_digest:
            return (
                f"worker {info.worker_id} has another model {info.model_id!r} than worker "
                f"{other.worker_id} (digests {info.model_digest} and {other.model_digest}); "
                "models that differ need folders of different names"
            )
    return ""
