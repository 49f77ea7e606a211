"""What the two transports share besides `_transport.base`: the limit of a message."""

from __future__ import annotations

from ._transport.base import PeerCredentials, deadline_after, remaining
from .errors import EXHAUSTED, MessageTooLarge

__all__ = ["EXHAUSTED", "PeerCredentials", "check_size", "deadline_after", "remaining"]


def check_size(size: int, limit: int | None) -> None:
    """Raise `MessageTooLarge` if the peer's message of `size` bytes is above `limit`, if there is one."""
    if limit is not None and size > limit:
        raise MessageTooLarge(
            f"the peer sent a message of {size} bytes, above the limit of {limit} bytes: raise max_message on both sides",
            size=size,
            limit=limit,
        )
