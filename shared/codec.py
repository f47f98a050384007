"""Messages and records to msgpack and back, by cattrs; an unknown or malformed one is an error."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import msgpack
from cattrs.errors import BaseValidationError, StructureHandlerNotFoundError
from cattrs.preconf.msgpack import make_converter
from cattrs.strategies import configure_tagged_union

from shared import messages
from shared.errors import ProtocolError

_converter = make_converter(forbid_extra_keys=False, detailed_validation=False)
configure_tagged_union(messages.Message, _converter, tag_name="type")

T = TypeVar("T")


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
        msgpack.UnpackException,
        BaseValidationError,
        StructureHandlerNotFoundError,
    ) as error:
        raise ProtocolError(f"unreadable message of {len(payload)} bytes: {error!r}") from error
