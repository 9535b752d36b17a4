"""Who this gate is: kept in ``SPOOL_DIR``, so that it does not follow the host name.

The broker keeps messages under the client id, rows carry the instance id. Both have the host name
as their default, and a host name changes: a renamed machine, a new container. What the broker has
queued would then stay in a session that no client opens again. So the first id is kept in a file of
its own, not in spool.db: a damaged spool is replaced by a new one, and the forwarders need the id
before there is a spool. The collector writes the file, every program reads it.
"""

import contextlib
import os
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

IDENTITY_FILE = "identity.json"
FORMER_SESSIONS_MAX = 8
"""Kept for an operator who looks for messages that the broker still holds."""

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}\Z")]
ClientId = Annotated[str, Meta(min_length=1, max_length=240)]


class SessionId(msgspec.Struct, frozen=True):
    """What a broker knows a session by, and which broker it is."""

    client_id: ClientId
    broker: str
    port: int


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a gate."""

    instance_id: Name
    session: SessionId | None = None
    """The one that the broker granted a subscription last; None before the first."""
    former: tuple[SessionId, ...] = ()
    """Those before it, the latest last: a broker may still hold messages for them."""

    def moved_to(self, session: SessionId) -> "Identity":
        """Return the identity whose session is ``session`` from now on."""
        earlier = [*self.former, *([self.session] if self.session else [])]
        former = [one for one in dict.fromkeys(reversed(earlier)) if one != session]
        return msgspec.structs.replace(
            self, session=session, former=tuple(reversed(former[:FORMER_SESSIONS_MAX]))
        )


def read_identity(directory: Path) -> Identity | None:
    """Return what is kept in ``directory``; None if nothing is, or if it cannot be read.

    Without it the ids are what they are on a first start, which is right unless the host name has
    changed too; a program must not fail to start for that.
    """
    try:
        return msgspec.json.decode((directory / IDENTITY_FILE).read_bytes(), type=Identity)
    except (OSError, msgspec.DecodeError):
        return None


def write_identity(directory: Path, identity: Identity) -> None:
    """Keep ``identity``, durably. Call only as the collector, with its lock held.

    Raises:
        OSError: It cannot be written; the earlier one stays.
    """
    path = directory / IDENTITY_FILE
    new = path.with_suffix(".new")
    try:
        with new.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(identity), indent=2) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
