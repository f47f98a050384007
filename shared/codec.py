"""Messages and records to msgpack and back, by cattrs; an unknown or malformed one is an error.

This is where everything that comes from outside is checked, once: types, and the range of each
number by its field's name. Whoever holds a message may trust it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar, cast, get_type_hints

import msgpack
from cattrs.errors import BaseValidationError, StructureHandlerNotFoundError
from cattrs.gen import make_dict_structure_fn
from cattrs.preconf.msgpack import make_converter
from cattrs.strategies import configure_tagged_union

from shared import messages
from shared.errors import ProtocolError

_NUMBERS: Final = (0, 2**63 - 1)
"""What a number may be, unless `_BOUNDS` says otherwise."""

_BOUNDS: Final[Mapping[str, tuple[float, float]]] = {
    "priority": (-1_000_000, 1_000_000),
    "deadline_ms": (0, 10**12),
    "seed": (0, 2**64 - 1),
    "height": (1, 65_536),
    "width": (1, 65_536),
    "num_inference_steps": (1, 100_000),
    "guidance_scale": (-10_000, 10_000),
    "output_compression": (0, 100),
    "num_forwards": (0, 1_000_000),
    "step_index": (0, 1_000_000),
    "next_step_index": (-1, 1_000_000),
    "last_full": (-1, 1_000_000),
    "slot": (-1, 2**31),
    "epoch": (0, 2**53),
    "num_chunks": (0, 4_096),
    "threads": (0, 4_096),
    "waiting_share": (0, 1),
    "max_requests": (0, 1_000_000),
}
"""Least and greatest value of a field, in whichever message it stands."""

_COLLECTIONS: Final = (tuple[int, ...], tuple[float, ...], dict[int, float], dict[str, int])
"""Of numbers, each within `_NUMBERS`."""

_MAX_NAME: Final = 256
_NAMES: Final = frozenset({"request_id", "job_id", "attempt", "incarnation", "worker_id"})
"""Fields that keys are made of: not empty, and not long. An attempt may be empty."""

_CHECKED: Final = frozenset({"shared.messages", "shared.records"})
"""Modules whose dataclasses several services write and read."""

_converter = make_converter(forbid_extra_keys=False, detailed_validation=False)


def _exactly(kind: type) -> Callable[[Any, Any], Any]:
    """A hook that takes these types alone: `int("5")` and `str(None)` are nobody's intention."""

    def structure(value: Any, _: Any) -> Any:
        if type(value) is not kind:
            raise TypeError(f"{type(value).__name__} where {kind.__name__} belongs")
        return value

    return structure


def _float(value: Any, _: Any) -> float:
    if type(value) not in {float, int}:
        raise TypeError(f"{type(value).__name__} where a number belongs")
    return float(value)


_converter.register_structure_hook(int, _exactly(int))
_converter.register_structure_hook(float, _float)
_converter.register_structure_hook(bool, _exactly(bool))
_converter.register_structure_hook(str, _exactly(str))


def _checked(kind: type) -> Callable[[Any, Any], Any]:
    """A hook for a dataclass that also checks its fields' ranges."""
    structure: Any = make_dict_structure_fn(kind, _converter)
    types = get_type_hints(kind)
    bounds = {
        field.name: _BOUNDS.get(field.name, _NUMBERS)
        for field in dataclasses.fields(kind)
        if types[field.name] in {int, float, float | None}
    }
    collections = [name for name, hint in types.items() if hint in _COLLECTIONS]
    names = [field.name for field in dataclasses.fields(kind) if field.name in _NAMES]

    def check(value: Any, _: Any) -> Any:
        made = structure(value, kind)
        for name, (least, greatest) in bounds.items():
            number = getattr(made, name)
            # Not a number is within no bounds, either.
            if number is not None and not least <= number <= greatest:
                raise ValueError(f"{name} is {number}, not within {least} to {greatest}")
        for name in collections:
            numbers = getattr(made, name)
            if types[name] == dict[int, float] and min(numbers, default=1) < 1:
                raise ValueError(f"{name} counts from {min(numbers)}")
            values = numbers.values() if isinstance(numbers, dict) else numbers
            if not all(_NUMBERS[0] <= number <= _NUMBERS[1] for number in values):
                raise ValueError(f"{name} holds what is not within {_NUMBERS}")
        for name in names:
            length = len(getattr(made, name))
            if length > _MAX_NAME or (length == 0 and name != "attempt"):
                raise ValueError(f"{name} has {length} characters")
        return made

    return check


_converter.register_structure_hook_factory(
    lambda kind: dataclasses.is_dataclass(kind) and kind.__module__ in _CHECKED, _checked
)
configure_tagged_union(messages.Message, _converter, tag_name="type")

T = TypeVar("T")

_MAX_REASON: Final = 500


def encode(message: messages.Message) -> bytes:
    """One message as msgpack, its class name under "type"."""
    return cast(
        "bytes",
        msgpack.packb(_converter.unstructure(message, messages.Message), use_bin_type=True),
    )


def decode(payload: bytes) -> messages.Message:
    """The message that `encode` wrote.

    Raises:
        ProtocolError: The bytes are not msgpack, or no message of this version.
    """
    return cast("messages.Message", decode_value(payload, cast("Any", messages.Message)))


def encode_value(value: object) -> bytes:
    """A dataclass (or plain value) that is no message, as msgpack."""
    return cast("bytes", msgpack.packb(_converter.unstructure(value), use_bin_type=True))


def decode_value(payload: bytes, kind: type[T]) -> T:
    """The value of type `kind` that `encode_value` wrote.

    Raises:
        ProtocolError: The bytes are not msgpack, or not of this shape.
    """
    try:
        return _converter.structure(msgpack.unpackb(payload, strict_map_key=False), kind)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
        msgpack.UnpackException,
        BaseValidationError,
        StructureHandlerNotFoundError,
    ) as error:
        reason = repr(error)[:_MAX_REASON]
        raise ProtocolError(f"unreadable message of {len(payload)} bytes: {reason}") from error


def peek(payload: bytes, name: str, kind: type[T]) -> T | None:
    """A field of a message that can't be decoded as a whole; None if not even that can be read."""
    try:
        fields = msgpack.unpackb(payload, strict_map_key=False)
    except (ValueError, msgpack.UnpackException, RecursionError):
        return None
    value = fields.get(name) if isinstance(fields, dict) else None
    return value if type(value) is kind and value and len(str(value)) <= _MAX_NAME else None
