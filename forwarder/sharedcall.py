"""A call that cannot be interrupted, and is waited for only so long.

Resolving a name takes up to a minute where the name servers are silent. Google's client asks for a
token four times over, and gives each address of the host the whole deadline: with an uplink that
swallows everything, 25 minutes. Nobody who has to tell of his life may wait for that himself.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

_T = TypeVar("_T")


class SharedCall(Generic[_T]):
    """One call at a time, in a thread of its own, for all who ask; may be asked by several threads.

    Who gives up leaves the call running, and who asks before it has ended gets what it brings. So
    threads do not pile up, and a call that takes longer than anybody waits is still of use.

    Args:
        name: What is called, for the error and the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._beginning = threading.Lock()
        self._call: Future[_T] | None = None

    def result(self, work: Callable[[], _T], timeout_s: float) -> _T:
        """Return what ``work`` returns, or what the call brings that was begun before.

        Args:
            work: What to call; in effect the same each time.
            timeout_s: How long to wait for it.

        Raises:
            TimeoutError: It is not over in time, and goes on.
            Exception: What it raises.
        """
        with self._beginning:
            call = self._call
            if call is None or call.done():
                call = self._call = Future()
                threading.Thread(
                    target=_make, args=(call, work), name=self._name, daemon=True
                ).start()
        try:
            return call.result(max(0.0, timeout_s))
        except TimeoutError:
            if call.done():  # at the last moment, or it is its own error
                return call.result()
            raise TimeoutError(f"{self._name}: no answer within {timeout_s:.0f} s") from None


def _make(call: "Future[_T]", work: Callable[[], _T]) -> None:
    try:
        call.set_result(work())
    except BaseException as error:  # noqa: BLE001 - it is for those who wait
        call.set_exception(error)
