"""Group commit: how long a message may wait so that others share its commit.

Each commit is a sync and some pages of the write-ahead log, for one reading or for a thousand.
Sensors send one by one, so committing each at once would write a hundred times what the readings
weigh, and flash memory wears out by that. So a commit does not begin sooner than COMMIT_DELAY_MS
after the last one began. A message that comes when none began within that time goes at once.

**When the wait ends early.** With ENOUGH_MESSAGES; and when the broker's window is full. A broker
has a bound for what it has sent and not yet seen acknowledged (Mosquitto's default is 20, others
have 1), and we acknowledge after the commit. At the bound it sends nothing more, waiting brings
nothing, and what the sensors send meanwhile fills its queue, beyond which it drops. MQTT 3.1.1 does
not tell the bound, so it is found out:

- *Silence.* Where nothing has come for PATIENCE_GAPS usual gaps between messages, the commit
  begins. A gap is measured from the last message or acknowledgement, so our own waiting is none;
  the way to the broker and back, the least that an acknowledgement is followed by, is none either.
- *Not below what was outstanding lately.* Who has sent 40 without an acknowledgement has a window
  of 40 at the least. A silence at 10 is the sensors' (they send in bursts): patience is longer.
- *The window.* Where waits end in silence with the same number outstanding, again and again, that
  number is taken for the window, and a commit begins as soon as so many are outstanding.
- *Refuted* it is by more than that outstanding. Now and then a wait goes on at the full window, to
  see whether more comes: sensors that send bursts of equal size look the same. Such a trial lasts
  no longer than what a broker's queue easily takes, at the rate of late.

With a broker so distant that an answer takes longer than the delay, no full window is ever seen
here, and the delay adds to the way: the rate is bounded by the window over the sum of both.

While a reader pins the write-ahead log (:mod:`spool.logwatch`), each commit stays in it. Then the
delay is STRETCHED_S at the least, by the same rules.
"""

import time
from collections import deque
from collections.abc import Callable

ENOUGH_MESSAGES = 500
"""So many are worth a commit: its fixed price is a hundredth of theirs. Half of the recommended
max_inflight_messages, so that a broker goes on sending while they are committed."""

STRETCHED_S = 0.5
"""The least delay while commits are stretched."""

PATIENCE_GAPS = 8
PATIENCE_LEAST_S = 0.010
"""Above the time that a broker takes to send, and a LAN to carry, what stands in its queue."""

PATIENCE_LONG_S = 0.25
"""Below what was outstanding lately; longer than that, no silence is waited out. At a high rate it
is shorter, for a broker may have sent once what it never sends again (TRIAL_MESSAGES)."""

GAP_FADES = 0.75
"""What is left of a gap in the mean after one message more: a burst counts soon."""

ANSWER_RISES = 1.1

LATE_COMMITS = 3
NEARLY = 7 / 8
"""With so much of what was outstanding lately, the window may be full: it may be one of bytes."""

SILENT_WEIGHT = 2
SURE = 6
"""The window is known after three waits that ended in silence, or six that ended by their time
with nothing more coming (a distant broker's answer takes longer than the patience)."""

TRIAL_EVERY_S = 1.0
TRIAL_EVERY_MAX_S = 8.0
TRIAL_SHARE = 20
"""Trials in vain come twice as seldom each time, and take at most one part in this many."""

TRIAL_MESSAGES = 50
"""So many may gather in the broker's queue by a trial. Mosquitto's has 1,000, older ones 100."""

RATE_OVER_S = 1.0


class Gathering:
    """Decides how long to wait before each commit. The caller holds one lock for all calls.

    Args:
        delay_s: COMMIT_DELAY_MS, in seconds.
        clock: Seconds, monotonic.
    """

    def __init__(self, delay_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._delay_s = delay_s
        self._clock = clock
        self.stretched = False
        """Whether commits are to be few. Set by the thread that takes."""
        self._begun_at = float("-inf")
        self._rate = 0.0
        self._connection = 0
        self._connected()

    def _connected(self) -> None:
        """Forget what holds for one connection only."""
        self._last_at = float("-inf")
        self._gap_s = 0.0
        self._answer_s = PATIENCE_LONG_S
        """How soon the broker sends what stands in its queue, after an acknowledgement."""
        self._outstanding = 0
        self._late: deque[int] = deque([0], maxlen=LATE_COMMITS)
        self._silent_at = 0
        self._sure = 0
        self._window = 0
        self._end_trial()
        self._trial_every_s = TRIAL_EVERY_S
        self._trial_at = 0.0
        self._waited = False
        self._look_at = 0.0

    def _end_trial(self) -> None:
        self._trial_since: float | None = None
        self._silent = False
        self._open = False

    @property
    def delay_s(self) -> float:
        """From one commit's begin to the next's."""
        return max(self._delay_s, STRETCHED_S) if self.stretched else self._delay_s

    @property
    def window(self) -> int:
        """How many messages the broker has outstanding at most; 0 while that is not known."""
        return self._window

    @property
    def outstanding(self) -> int:
        """How many messages are to be acknowledged still."""
        return self._outstanding

    def arrived(self, connection: int, messages: int) -> None:
        """Take note of messages that are to be acknowledged, of one read."""
        if connection != self._connection:
            self._connection = connection
            self._connected()
        if not messages:
            return
        now = self._clock()
        fades = GAP_FADES**messages
        gap_s = min(now - self._last_at, PATIENCE_LONG_S)
        if not self._outstanding:
            self._answer_s = min(gap_s, self._answer_s * ANSWER_RISES)
            gap_s -= self._answer_s
        gap_s /= messages
        self._gap_s = self._gap_s * fades + gap_s * (1 - fades)
        self._last_at = now
        self._outstanding += messages
        if self._window and self._outstanding > self._window:
            self._refuted()

    def _refuted(self) -> None:
        """Take note that the broker has sent more than the window that was assumed."""
        self._window = 0
        # By a trial: then the silence was the sensors', and this wait takes no other for more.
        # Without one it may be a broker that does not always keep to its window (Mosquitto
        # 2.0.11), and the next silence at the same number confirms it.
        self._open = self._trial_since is not None
        self._sure = 0 if self._open else SURE - SILENT_WEIGHT
        self._trial_since = None

    def acknowledged(self, messages: int) -> None:
        """Take note that acknowledgements went out on the present connection."""
        self._outstanding = max(0, self._outstanding - messages)
        self._last_at = self._clock()

    def enough(self, messages: int) -> bool:
        """Return whether a commit of ``messages`` need not wait any longer, whatever the time."""
        if messages >= ENOUGH_MESSAGES:
            return True
        full = 0 < self._window <= self._outstanding
        return full and self._trial_since is None and self._clock() < self._trial_at

    def interrupts(self, messages: int) -> bool:
        """Return whether to look at :meth:`left_s` now, and not when its last answer has passed.

        Args:
            messages: How many wait.
        """
        if self.enough(messages):
            return True
        if self._trial_since is not None or not self._outstanding:
            return False
        # Where messages come faster than before, the patience is shorter than it was.
        return self._look_at - self._last_at > 2 * self._patience_s()

    def left_s(self, messages: int) -> float:
        """Return how long the next commit is still to wait; 0 if it is to begin.

        Args:
            messages: How many wait.
        """
        now = self._clock()
        self._silent = False
        left_s = self._begun_at + self.delay_s - now
        if left_s <= 0 or self.enough(messages):
            return 0.0
        self._waited = True
        quiet_s = left_s  # QoS 0: no acknowledgement is waited for
        if 0 < self._window <= self._outstanding:
            if self._trial_since is None:
                self._trial_since = now
            took_s = max(self._last_at - self._begun_at, 1e-6)
            rate = max(self._rate, messages / took_s, 1.0)
            quiet_s = self._trial_since + TRIAL_MESSAGES / rate - now
        elif self._outstanding:
            quiet_s = self._last_at + self._patience_s() - now
        self._silent = quiet_s <= 0
        left_s = max(0.0, min(left_s, quiet_s))
        self._look_at = now + left_s
        return left_s

    def _patience_s(self) -> float:
        # Sensors in bursts fill no queue while a wait takes this long; and if it is the window, a
        # broker that has sent more than that before, little.
        long_s = min(PATIENCE_LONG_S, max(PATIENCE_LEAST_S, TRIAL_MESSAGES / max(self._rate, 1.0)))
        if self._open:
            return long_s
        suspect = self._sure > 0 and self._outstanding == self._silent_at
        if self._outstanding < NEARLY * max(self._late) and not suspect:
            return long_s
        return min(max(PATIENCE_LEAST_S, PATIENCE_GAPS * self._gap_s), PATIENCE_LONG_S)

    def begins(self, messages: int) -> None:
        """Take note that a commit of ``messages`` begins now."""
        now = self._clock()
        if self._trial_since is not None:
            spent_s = now - self._trial_since
            self._trial_every_s = min(2 * self._trial_every_s, TRIAL_EVERY_MAX_S)
            self._trial_at = now + max(self._trial_every_s, TRIAL_SHARE * spent_s)
        elif self._waited and not self._window and not self._open:
            self._learn(now)
        self._late.append(self._outstanding)
        since_s = now - self._begun_at
        self._rate += (messages / max(since_s, 1e-6) - self._rate) * min(1.0, since_s / RATE_OVER_S)
        self._begun_at = now
        self._waited = False
        self._end_trial()

    def _learn(self, now: float) -> None:
        """Judge by how a wait has ended whether the window is full with what is outstanding."""
        weight = SILENT_WEIGHT if self._silent else int(now - self._last_at >= self._gap_s)
        if not self._outstanding or not weight:
            self._sure = 0
            return
        if self._outstanding != self._silent_at:
            self._sure = 0
        self._silent_at = self._outstanding
        self._sure += weight
        if self._sure >= SURE:
            self._window = self._outstanding
            self._trial_every_s = TRIAL_EVERY_S
            self._trial_at = now + TRIAL_EVERY_S
