"""``python -m tests.harness.short_logs forwarder pubsub``: the same programs, short logs.

The bound of a write-ahead log is 64 MiB above SPOOL_MAX_BYTES, which takes minutes to fill. This
changes the first of the two before the program begins; everything else is as it is.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import forwarder.drain
import spool.connection
import spool.logwatch
import spool.sinkstate
from lifecycle import leave
from tests.harness.programs import Program
from tests.harness.rig import PROGRAMS, Rig

KEPT_BYTES = 1024 * 1024

MANY_ROWS = (
    "with recursive n (i) as (select 1 union all select i + 1 from n where i < 1000000) "
    "select n.i, s.name from n, sqlite_schema as s"
)
"""More than a pipe holds, of any of the files."""


def shorten(rig: Rig) -> None:
    """Have the programs of ``rig`` run with short logs. Before they are started."""
    for name in PROGRAMS:
        program, _, sink = name.partition("-")
        command = [sys.executable, "-m", "tests.harness.short_logs", program, *filter(None, [sink])]
        rig.programs[name] = Program(name, command, rig.variables, rig.directory / f"{name}.log")


@contextmanager
def pager(path: Path, statement: str = MANY_ROWS) -> Iterator["subprocess.Popen[bytes]"]:
    """Run ``sqlite3 -readonly`` on ``path`` into a pipe that is not read, as before a pager.

    It is within its read transaction when this gives it out.
    """
    process = subprocess.Popen(
        ["sqlite3", "-readonly", path, statement], stdout=subprocess.PIPE, cwd="/"
    )
    assert process.stdout is not None
    try:
        assert os.read(process.stdout.fileno(), 1), "a row is there, so it has begun"
        yield process
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


if __name__ == "__main__":
    if not hasattr(spool.logwatch, "WAL_KEPT_BYTES"):
        raise AttributeError("spool.logwatch no longer has WAL_KEPT_BYTES")
    spool.logwatch.WAL_KEPT_BYTES = KEPT_BYTES
    # And a sink's log grows fast: by the large pages of older files, with each batch.
    spool.sinkstate.PAGE_BYTES = spool.connection.USUAL_PAGE_BYTES
    forwarder.drain.LAG_MAX_S = 0.0  # type: ignore[attr-defined] # its own name for it
    if sys.argv[1] == "collector":
        from collector import __main__ as collector

        leave(collector.main())
    from forwarder import __main__ as sender

    leave(sender.main(sys.argv[2:]))
