"""The last so many event ids, to spool a message once that the broker delivers twice."""

from collections.abc import Iterable


class DedupWindow:
    """Remembers the last ``size`` event ids.

    In memory, because a unique index on the spool would cost four and a half times the insert
    rate; filled again from the spool's tail at start.
    """

    def __init__(self, size: int, ids: Iterable[bytes] = ()) -> None:
        self._size = size
        self._ring: list[bytes] = []
        self._known: set[bytes] = set()
        self._next = 0
        for identity in ids:
            self.add(identity)

    def add(self, identity: bytes) -> bool:
        """Remember ``identity``; return whether it was new.

        Only call for what is about to be spooled: what is remembered here but never becomes
        durable would be taken for a duplicate when the broker sends it again. After a failed
        commit, make a new window from the spool.
        """
        if not self._size:
            return True
        known = self._known
        if identity in known:
            return False
        known.add(identity)
        ring = self._ring
        if len(ring) < self._size:
            ring.append(identity)
        else:
            known.discard(ring[self._next])
            ring[self._next] = identity
            self._next = (self._next + 1) % self._size
        return True
