"""Every error Headwater raises on purpose, by whose fault it is.

    HeadwaterError
    ├── UsageError                the caller's mistake
    │   ├── SettingError          a setting is wrong or differs from the job's (also a ValueError)
    │   ├── LayoutError           names, shapes or dtypes do not fit what is registered (also a ValueError)
    │   ├── NonFiniteError        a gradient held NaN or infinity: the push was refused, the clock closed without it
    │   ├── DisagreementError     a step's scalars differ from another worker's at the same clock
    │   └── ClosedError           used after close, or in a forked child
    ├── PeerError                 the other side's misbehaviour or death
    │   ├── ProtocolError         bytes that are not this protocol
    │   ├── AuthenticationError   no token, a wrong one, or another user
    │   ├── RequestError          a request to a served model that cannot be answered
    │   └── PeerLostError         the connection ended
    ├── HostError                 the surroundings
    │   ├── UnreachableError      nobody listens there
    │   ├── AddressError          cannot listen there
    │   ├── StorageError          a saved file is missing, torn or of another model
    │   └── WaitTimeoutError      a wait passed its limit; says for whom (also a TimeoutError)
    └── InternalError             our bug: please report it

A message says what was expected, what came, where, and what to do next.
"""

from __future__ import annotations


class HeadwaterError(Exception):
    """Base of every error raised on purpose."""


class UsageError(HeadwaterError):
    """The caller's mistake."""


class SettingError(UsageError, ValueError):
    """A setting is wrong, or differs from the job's."""


class LayoutError(UsageError, ValueError):
    """Names, shapes or dtypes do not fit what is registered."""


class NonFiniteError(UsageError):
    """A gradient held NaN or infinity; the push counted nowhere and the clock closed without it."""


class DisagreementError(UsageError):
    """A step's scalars differ from another worker's at the same clock; the push counted nowhere."""


class ClosedError(UsageError):
    """Used after close, or in a forked child."""


class PeerError(HeadwaterError):
    """The other side misbehaved or died."""


class ProtocolError(PeerError):
    """Bytes arrived that are not this protocol; the connection is closed."""


class AuthenticationError(PeerError):
    """The peer showed no token, a wrong one, or belongs to another user."""


class RequestError(PeerError):
    """A request to a served model cannot be answered; nothing has changed."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status  # of HTTP


class PeerLostError(PeerError, ConnectionError):
    """The connection ended; a push that was not yet acknowledged may or may not have counted."""


class HostError(HeadwaterError):
    """The surroundings: network, ports, time."""


class UnreachableError(HostError, ConnectionError):
    """Nobody listens at the address."""


class AddressError(HostError):
    """It is not possible to listen at the address."""


class StorageError(HostError):
    """A saved file is missing, torn, or of another model."""


class WaitTimeoutError(HostError, TimeoutError):
    """A wait passed its limit; the message says for whom."""


class InternalError(HeadwaterError):
    """A bug in Headwater; please report it with the traceback."""


def _tree(root: type[HeadwaterError]) -> dict[str, type[HeadwaterError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


#: Class by name: how an error that was sent over the wire becomes the same error here.
BY_NAME = _tree(HeadwaterError)


def warn(text: str) -> None:
    """Say something to people."""
    import logging  # here, so that start-up does not pay for it

    logging.getLogger("headwater").warning(text)


def debug(text: str) -> None:
    """Say something to those who look for it."""
    import logging

    logging.getLogger("headwater").info(text)
