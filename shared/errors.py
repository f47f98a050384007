"""The one error tree. What a client caused and what we caused are different branches."""

from __future__ import annotations

from typing import Final

EXIT_CONFIGURATION: Final = 78
"""The exit code of a process that ends by a `ConfigurationError` (EX_CONFIG of sysexits.h): started
again as it is, it would end the same way."""

EXIT_STUCK: Final = 75
"""That of a worker which found itself hanging (EX_TEMPFAIL): started again, it can work."""


class SynerDiffError(Exception):
    """Root of every error this project raises on purpose."""

    code: str = "internal_error"


class ConfigurationError(SynerDiffError):
    """A setting or a model folder is unusable; the start stops, naming it and what it should be."""

    code = "configuration_error"


class InvalidRequestError(SynerDiffError):
    """The client's request can't be served as it is.

    Args:
        message: What is wrong, in words for the client.
        field: The request's field that is wrong, None if it is the body as a whole.
        allowed: The allowed values or range, in words; appended to the message.
    """

    code = "invalid_request"

    def __init__(
        self, message: str, *, field: str | None = None, allowed: str | None = None
    ) -> None:
        super().__init__(f"{message} Allowed: {allowed}." if allowed else message)
        self.field = field
        self.allowed = allowed


class OverloadedError(SynerDiffError):
    """The service takes no more work for now.

    Args:
        message: Why.
        retry_after_s: Seconds after which another try makes sense.
    """

    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NumericalError(SynerDiffError):
    """A request's latents or image are not finite; its neighbours in the batch are unharmed."""

    code = "not_finite"


class HandleLostError(SynerDiffError):
    """A tensor handle can't be opened, or its slot has been given to somebody else."""

    code = "handle_lost"


class ProtocolError(SynerDiffError):
    """A message that no peer of this version sends; our bug or a foreign writer."""

    code = "protocol_error"


class IllegalTransitionError(SynerDiffError):
    """The scheduler's core was asked for a state change that its table forbids; our bug."""

    code = "illegal_transition"


class EpochEndedError(SynerDiffError):
    """Another scheduler is in charge, or Redis came back as another; a fresh start follows."""

    code = "epoch_ended"
