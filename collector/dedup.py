"""The last so many event ids, to spool a message once that the broker delivers twice.

An id in a set of Python's costs 110 bytes, 11 MB for the usual window, and 4 MB more whenever the
set is rebuilt, which happens all the time where as many ids are forgotten as are added. Here the
ids stand one behind the other in small buckets, 20 bytes each all in all; looking one up takes
0.3 µs more.
"""

from array import array
from collections.abc import Iterable

BUCKET_IDS = 24
"""How many ids a bucket holds on average: fewer are not found faster, and cost more memory."""


class DedupWindow:
    """Remembers the last ``size`` event ids.

    In memory, because a unique index on the spool would cost four and a half times the insert
    rate; filled again from the spool's tail at start.
    """

    def __init__(self, size: int, ids: Iterable[bytes] = ()) -> None:
        self._size = size
        self._count = size // BUCKET_IDS + 1
        # One more, which stays empty: what the ring points to before the window is full.
        self._buckets = [bytearray() for _ in range(self._count + 1)]
        # In the order of arrival, which bucket has the id. Within a bucket the oldest comes
        # first, so that is all that is needed to forget the oldest of all.
        self._ring = array("I", [self._count]) * size
        self._next = 0
        for identity in ids:
            self.add(identity)

    def __len__(self) -> int:
        """Return how many ids are remembered."""
        return self._size - self._ring.count(self._count)

    def add(self, identity: bytes) -> bool:
        """Remember ``identity``; return whether it was new.

        Only call for what is about to be spooled: what is remembered here but never becomes
        durable would be taken for a duplicate when the broker sends it again. After a failed
        commit, make a new window from the spool.

        Args:
            identity: A hash; all of one length.
        """
        if not self._size:
            return True
        buckets, ring, place = self._buckets, self._ring, self._next
        number = hash(identity) % self._count
        bucket = buckets[number]
        # That the end of one id and the beginning of the next are a third is as unlikely as that
        # two hashes are equal. (find() takes half of the time of `in`.)
        if bucket.find(identity) >= 0:
            return False
        del buckets[ring[place]][: len(identity)]
        ring[place] = number
        bucket += identity
        place += 1
        self._next = place if place < self._size else 0
        return True
