"""The demo's course: ``python -m demo --dir DIRECTORY [--seconds N]``, run by install.sh."""

import argparse
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from demo import processes, view
from demo.broker import Broker, BrokerName, running_broker
from demo.errors import DemoError
from demo.layout import Layout
from demo.ledger import read_figures
from demo.simulator import READINGS_PER_S, SITES, Simulator
from demo.summary import look_lines, reconcile, summary_lines
from demo.supervision import Supervisor, running_supervisor
from lifecycle import VERSION

_SUBSCRIBE_TIMEOUT_S = 30.0
_ACK_TIMEOUT_S = 10.0
_RECEIVE_TIMEOUT_S = 15.0
_DRAIN_TIMEOUT_S = 10.0
_POLL_S = 0.1
_LINE_INTERVAL_S = 1.0

_EXIT_OK, _EXIT_FAILED = 0, 1


@dataclass(frozen=True)
class Arguments:
    """What the command line said."""

    layout: Layout
    broker: BrokerName
    seconds: float | None


class Interrupt:
    """Ctrl-C, SIGTERM or SIGHUP: the first asks for an orderly end, the second for any end."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked.is_set():
            raise KeyboardInterrupt
        self.asked.set()


def main() -> int:
    """Run the demo; return the exit code."""
    arguments = _arguments()
    interrupt = Interrupt()
    processes.adopt_orphans()
    try:
        arguments.layout.check()
        return _run(arguments, interrupt)
    except DemoError as error:
        _say(f"\nThe demo failed: {error}")
    except KeyboardInterrupt:
        _say("\nInterrupted twice: stopped at once, without a summary.")
    finally:
        strays = processes.kill_descendants()
        _say("Nothing is left running" + (f" (killed: {strays})." if strays else "."))
    return _EXIT_FAILED


def _run(arguments: Arguments, interrupt: Interrupt) -> int:
    layout = arguments.layout
    layout.prepare()
    with running_broker(arguments.broker, layout) as broker:
        layout.write_settings(broker.port)
        simulator = Simulator("127.0.0.1", broker.port)
        try:
            simulator.connect()
            simulator.announce()
            with running_supervisor(layout) as supervisor:
                head = f"Sluice {VERSION}; {broker.name} on port {broker.port}"
                _say(f"{head}; supervisord is starting ...\n")
                _say("$ supervisorctl status\n" + supervisor.wait_until_running() + "\n")
                _await_subscription(layout)
                simulator.start()
                _watch(arguments, interrupt, _Parts(broker, supervisor, simulator))
                _say("\nStopping: the simulator first, then what it sent is awaited ...")
                simulator.stop(_ACK_TIMEOUT_S)
                _await_all(layout, simulator)
        finally:
            simulator.stop(0)
    return _conclude(layout, simulator)


@dataclass(frozen=True)
class _Parts:
    """Everything that must keep running."""

    broker: Broker
    supervisor: Supervisor
    simulator: Simulator

    def check(self) -> None:
        for part in (self.broker, self.supervisor, self.simulator):
            part.check()


def _watch(arguments: Arguments, interrupt: Interrupt, parts: _Parts) -> None:
    """Print a line a second until the time is over or somebody interrupts."""
    length = f"for {arguments.seconds:g} s" if arguments.seconds else "until Ctrl-C"
    _say(f"{len(SITES)} sites, {READINGS_PER_S} readings a second, {length}:\n")
    started = time.monotonic()
    end = started + (arguments.seconds or float("inf"))
    count = 0
    while (now := time.monotonic()) < end:
        if interrupt.asked.wait(
            min(_LINE_INTERVAL_S - (now - started) % _LINE_INTERVAL_S, end - now)
        ):
            return
        parts.check()
        if count % view.REPEAT_HEADER_EVERY == 0:
            _say(view.header())
        _say(view.live_line(time.monotonic() - started, read_figures(arguments.layout.spool)))
        count += 1


def _await_subscription(layout: Layout) -> None:
    """Wait for what the simulator has announced; see there."""
    if not _wait(lambda: read_figures(layout.spool).received > 0, _SUBSCRIBE_TIMEOUT_S):
        raise DemoError(
            f"the collector runs, but has received nothing in {_SUBSCRIBE_TIMEOUT_S:.0f} s; "
            f"see {layout.log}/collector.log"
        )


def _await_all(layout: Layout, simulator: Simulator) -> None:
    """Give the collector time to receive everything, then the sinks to get it.

    Time runs out in silence: the summary then says what is missing.
    """
    published = simulator.published().total
    _wait(lambda: read_figures(layout.spool).received >= published, _RECEIVE_TIMEOUT_S)
    _wait(lambda: read_figures(layout.spool).pending == 0, _DRAIN_TIMEOUT_S)


def _wait(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Wait for ``condition``; say whether it came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _conclude(layout: Layout, simulator: Simulator) -> int:
    """Print the summary, from the files, now that every program has ended."""
    published = simulator.published()
    checks = reconcile(published, read_figures(layout.spool))
    _say(
        f"\nThe broker acknowledged {published.total} messages: {published.good} good readings,"
        f"\n{published.repeated} sent twice, {published.faulty} from a broken sensor.\n"
    )
    for line in summary_lines(checks):
        _say(line)
    for line in look_lines(layout):
        _say(line)
    return _EXIT_OK if all(check.holds for check in checks) else _EXIT_FAILED


def _arguments() -> Arguments:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="where everything lies")
    parser.add_argument("--broker", choices=("mosquitto", "amqtt"), default="mosquitto")
    parser.add_argument("--version", action="version", version=f"Sluice {VERSION}")
    parser.add_argument("--seconds", type=float, help="how long (default: until Ctrl-C)")
    parsed = parser.parse_args()
    return Arguments(Layout(parsed.dir.resolve()), parsed.broker, parsed.seconds)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
