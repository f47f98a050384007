"""Which workers there are, and the profile that each UNet worker is planned by."""

from __future__ import annotations

from collections.abc import Sequence

from services.scheduler.commands import ForgetWorker, KeepProfile
from services.scheduler.drift import Drift
from services.scheduler.endings import Endings
from services.scheduler.outbox import Outbox
from services.scheduler.policy import Policy
from services.scheduler.profile import Profile, matching_profile, profile_in_short
from services.scheduler.state import UnetWorker, VaeWorker
from shared import messages
from shared.messages import WorkerInfo


class Fleet:
    """How workers come and go; it shares the core's state.

    Args:
        unets, vaes: The core's own.
        policy: Sets a new UNet worker's first threshold.
        profiles: As measured ahead; workers that none was made for are profiled in short.
        endings: What becomes of a lost worker's requests.
        outbox: Where the messages go.
    """

    def __init__(
        self,
        unets: dict[str, UnetWorker],
        vaes: dict[str, VaeWorker],
        *,
        policy: Policy,
        profiles: Sequence[Profile],
        endings: Endings,
        outbox: Outbox,
    ) -> None:
        self._unets = unets
        self._vaes = vaes
        self._policy = policy
        self._profiles = tuple(profiles)
        self._endings = endings
        self._outbox = outbox

    def register(self, info: WorkerInfo) -> None:
        """A worker is there; whoever had its name is not any more."""
        known = [unet.info for unet in self._unets.values()]
        known += [vae.info for vae in self._vaes.values()]
        for one in known:
            if (one.worker_id, one.kind) == (info.worker_id, info.kind):
                self.lose(one.incarnation, forgets=one.incarnation != info.incarnation)
        reason = other_model(info, [one for one in known if self._is_there(one.incarnation)])
        if reason:
            refuse = messages.RefuseWorker(epoch=self._outbox.epoch, reason=reason)
            self._outbox.send(info.incarnation, "control", refuse)
            return
        if info.kind == "unet":
            self._unets[info.incarnation] = UnetWorker(
                info=info,
                profile=profile_in_short(info, ()),
                threshold=self._policy.first_threshold(),
            )
        else:
            self._vaes[info.incarnation] = VaeWorker(info=info)
        self._choose_profiles(info.device_group)
        self._outbox.ask_what_is_held(info.incarnation)

    def drain(self, incarnation: str) -> None:
        """A worker wants to leave: nothing new goes to it."""
        worker = self._unets.get(incarnation) or self._vaes.get(incarnation)
        if worker:
            worker.is_draining = True
            leave = messages.LeaveWhenDone(epoch=self._outbox.epoch)
            self._outbox.send(incarnation, "control", leave)

    def lose(self, incarnation: str, *, forgets: bool) -> None:
        """A worker is gone. forgets: and so is all that Redis has of it."""
        worker = self._unets.get(incarnation) or self._vaes.get(incarnation)
        if incarnation in self._unets:
            self._endings.lose_unet(incarnation)
        if incarnation in self._vaes:
            self._endings.lose_vae(incarnation)
        if worker:
            self._choose_profiles(worker.info.device_group)
        if forgets:
            self._outbox.add(ForgetWorker(incarnation=incarnation))

    def discard(self, incarnation: str) -> None:
        """Do without a worker that can't be planned for; Redis goes on knowing it."""
        if incarnation in self._unets:
            self._endings.lose_unet(incarnation)
        if incarnation in self._vaes:
            self._endings.lose_vae(incarnation)

    def adopt(self, incarnation: str, profile: Profile) -> None:
        """Plan a UNet worker by what was measured with it, and others that it fits."""
        self._unets[incarnation].drift = Drift()
        self._profiles = (*self._profiles, profile)
        for device_group in {one.info.device_group: None for one in self._unets.values()}:
            self._choose_profiles(device_group)
        self._outbox.add(KeepProfile(profile=profile))

    def unets_beside(self, vae: str) -> list[UnetWorker]:
        """Those on the device of a VAE worker."""
        group = self._vaes[vae].info.device_group if vae in self._vaes else ""
        return [unet for unet in self._unets.values() if unet.info.device_group == group]

    def _is_there(self, incarnation: str) -> bool:
        return incarnation in self._unets or incarnation in self._vaes

    def _choose_profiles(self, device_group: str) -> None:
        """Of a device's UNet workers, now that who shares it has changed."""
        unets = [one for one in self._unets.values() if one.info.device_group == device_group]
        vaes = [one.info for one in self._vaes.values() if one.info.device_group == device_group]
        workers = [*(unet.info for unet in unets), *vaes]
        takes_turns = not all(one.runs_side_by_side for one in workers)
        for unet in unets:
            measured = matching_profile(self._profiles, unet.info)
            profile = measured or profile_in_short(unet.info, vaes)
            unet.takes_turns = takes_turns
            unet.use_profile(profile.without_slots_beside() if takes_turns else profile)


def other_model(info: WorkerInfo, others: Sequence[WorkerInfo]) -> str:
    """Why a worker can't join these: another model of its model's name; empty if it can."""
    for one in others:
        has_other = one.model_id == info.model_id and one.model_digest != info.model_digest
        if has_other and one.model_digest and info.model_digest:
            return (
                f"worker {info.worker_id} has another model {info.model_id!r} than worker "
                f"{one.worker_id} (digests {info.model_digest} and {one.model_digest}); "
                "models that differ need folders of different names"
            )
    return ""
