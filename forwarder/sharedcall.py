"""A call that cannot be interrupted, and is waited for only so long.

Resolving a name takes up to a minute where the name servers are silent. Google's client asks for a
token four times over, and gives each address of the host the whole deadline: with an uplink that
swallows everything, 25 minutes. Nobody who has to tell of his life may wait for that himself.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

_T = TypeVar("_T")

KEPT_S = 60.0
"""How long a success is kept that nobody waited for: longer than a forwarder's backoff."""


class SharedCall(Generic[_T]):
    """One call at a time, in a thread of its own, for all who ask; may be asked by several threads.

    Who gives up leaves the call running, and who asks next gets what it brings, even if it ended
    in between. So threads do not pile up, and a call that takes longer than anybody waits is still
    of use.

    Args:
        name: What is called, for the error and the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._call: Future[_T] = Future()
        self._call.cancel()  # there is none yet
        self._number = 0
        self._kept_until = 0.0

    def result(self, work: Callable[[], _T], timeout_s: float, *, fresh: bool = False) -> _T:
        """Return what ``work`` returns, or what the call brings that was begun before.

        Args:
            work: What to call; in effect the same each time.
            timeout_s: How long to wait for it.
            fresh: Whether the call must have begun after this question.

        Raises:
            TimeoutError: It is not over in time, and goes on.
            Exception: What it raises.
        """
        ends_at = time.monotonic() + timeout_s
        with self._lock:
            wanted = self._number + (1 if fresh or not self._of_use() else 0)
        while True:
            with self._lock:
                if self._number < wanted and self._call.done():
                    self._begin(work)
                call, number = self._call, self._number
            try:
                call.exception(max(0.0, ends_at - time.monotonic()))
            except TimeoutError:
                if not call.done():
                    raise TimeoutError(
                        f"{self._name}: no answer within {timeout_s:.0f} s"
                    ) from None
            if number >= wanted:
                self._kept_until = 0.0
                return call.result()

    def _of_use(self) -> bool:
        return not self._call.done() or time.monotonic() < self._kept_until

    def _begin(self, work: Callable[[], _T]) -> None:
        call: Future[_T] = Future()
        self._kept_until = 0.0
        threading.Thread(target=self._make, args=(call, work), name=self._name, daemon=True).start()
        # Only now: a thread that could not be started would be waited for for ever.
        self._call = call
        self._number += 1

    def _make(self, call: "Future[_T]", work: Callable[[], _T]) -> None:
        try:
            brought = work()
        except BaseException as error:  # noqa: BLE001 - it is for those who wait
            call.set_exception(error)
        else:
            self._kept_until = time.monotonic() + KEPT_S
            call.set_result(brought)
