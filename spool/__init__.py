"""The spool: what stands on the disk between the broker and the cloud.

**Layout.** One directory, ``SPOOL_DIR`` (mode 2750), one SQLite file per writing process
(mode 0640), each in WAL mode with ``synchronous=FULL``:

* ``spool.db`` belongs to the collector: readings (``reading_row``), rejected messages
  (``rejected_row``), counters, and a snapshot of the sinks' progress;
* ``pubsub.db`` and ``bigquery.db`` belong to the forwarder of that name: its cursor, its dead
  letters, its gaps, its counters; in the latter also the append journal.

Everybody else opens a file read-only. Separate files, because a cursor's sync would otherwise
stand in the way of the collector's (measured on a slow disk: 743 ms instead of 15 ms at the
99th percentile), and because a single writer per file is the condition under which SQLite's
WAL-reset bug (3.7.0 to 3.51.2) cannot strike.

**Write.** The collector inserts a batch in one transaction (:class:`SpoolWriter`); when COMMIT
returns, the rows, and the counters that count them, are on the disk, and only then may the
broker hear "received". A failed commit is *unknown*: the writer is opened again and the
batch is checked against what is there.

**Read.** A forwarder reads ``seq > cursor`` in order (:class:`SpoolReader`). It sees a row only
once it is durable. ``seq`` grows by one per row and has no holes but at the low end.

**Acknowledge.** A forwarder moves its cursor over the contiguous prefix of rows that were
delivered, became dead letters, or were found missing (a gap), all in one transaction
(:class:`SinkState`). The cursor names the epoch of the spool it belongs to; a spool with
another epoch is read from its start, a cursor beyond the spool's end is an alarm. A step over
delivered rows alone may be noted some moments later, with the file's next transaction at the latest
(:mod:`spool.lag`); what a crash takes of that is delivered again.

While a site is held, others may be delivered ahead of it (:func:`load_ahead`): the cursor stays
before the held site's first reading, and the same transaction notes how far the others are.

A sink whose service takes rows at numbered places (:class:`AppendJournal`) notes each append
before it sends it, so that a crash repeats the same rows at the same place.

**Delete.** The collector reads the cursors (:class:`SinkFile`) and prunes what every enabled
sink has passed and ``SPOOL_RETENTION_HOURS`` no longer keep (:class:`Retention`): while readings
come in the transaction of the next batch, otherwise in small steps (:class:`Pruner`). A sink
whose file cannot be read holds everything, and so does one that no sink of this release declares
behind its cursor (:class:`SinkFiles`).

**Limits.** ``SPOOL_MAX_BYTES`` (:class:`Budget`): warn at 80 %, prune delivered rows early
at 90 %, at 100 % stop taking or drop the oldest, as ``SPOOL_FULL_POLICY`` says. Rejected
messages are a ring with a share of it, the first to give way. ``DEAD_LETTER_MAX_BYTES``
(:class:`DeadLetters`), in each sink's file: when it is full that sink holds. On a full disk the
:class:`Ballast` is given up. The write-ahead logs do not count: each has a bound of its own, at
which its owner commits nothing more until the reader that keeps it has ended (:class:`LogWatch`).

**Health.** What its owner knows to be wrong with a file stands in its table ``condition``
(:class:`Conditions`), for people in the view ``health``. Each owner leaves a sign of life in its
file (:class:`spool.beat.OwnerBeat`). The collector copies what the sinks' files say into spool.db,
so that its view ``health`` shows all that is wrong with an installation.

Each row carries a CRC of its content, checked when it is read for delivery.
"""

from spool.ahead import Ahead, AheadStep, load_ahead
from spool.apart import prepare_apart
from spool.beat import BEAT_S
from spool.brokerlink import BrokerLink, LinkState
from spool.conditions import Condition, Conditions
from spool.dead_letters import DEAD_LETTER_MAX_BYTES, DeadLetter, DeadLetters, Usage
from spool.errors import (
    CorruptFileError,
    CursorAheadError,
    DiskFullError,
    FileLockedError,
    FileMissingError,
    NewerFormatError,
    SpoolError,
    StorageFaultError,
    UnreadableFileError,
    WrongEnvironmentError,
)
from spool.files import sink_path, spool_path
from spool.guard import claim_environment, pending, refuse_backlog
from spool.insertion import REJECTED_PAYLOAD_BYTES
from spool.journal import AppendJournal, Cut, Journal
from spool.lag import LAG_MAX_ROWS, LAG_MAX_S
from spool.locks import LockWait
from spool.logwatch import LogWatch
from spool.notices import LogNotice
from spool.progress import LOGGED, SPOOL_DAMAGED, SinkFile, SinkProgress
from spool.reader import SpoolReader
from spool.records import (
    NewReading,
    Reading,
    Rejection,
    event_id,
    intact,
    presentable,
    row_crc,
)
from spool.recovery import SALVAGE_STEP_BYTES, Salvage
from spool.retention import Pruner, Retention
from spool.rights import wrong_owner
from spool.setaside import confirmed, lasting, readable, set_aside
from spool.sinkfiles import SinkFiles
from spool.sinkstate import Gap, Settlement, SinkState
from spool.space import ROW_OVERHEAD_BYTES, Ballast, Budget, Level
from spool.writer import SpoolWriter

__all__ = [
    "BEAT_S",
    "DEAD_LETTER_MAX_BYTES",
    "LAG_MAX_ROWS",
    "LAG_MAX_S",
    "LOGGED",
    "REJECTED_PAYLOAD_BYTES",
    "ROW_OVERHEAD_BYTES",
    "SALVAGE_STEP_BYTES",
    "SPOOL_DAMAGED",
    "Ahead",
    "AheadStep",
    "AppendJournal",
    "Ballast",
    "BrokerLink",
    "Budget",
    "Condition",
    "Conditions",
    "CorruptFileError",
    "CursorAheadError",
    "Cut",
    "DeadLetter",
    "DeadLetters",
    "DiskFullError",
    "FileLockedError",
    "FileMissingError",
    "Gap",
    "Journal",
    "Level",
    "LinkState",
    "LockWait",
    "LogNotice",
    "LogWatch",
    "NewReading",
    "NewerFormatError",
    "Pruner",
    "Reading",
    "Rejection",
    "Retention",
    "Salvage",
    "Settlement",
    "SinkFile",
    "SinkFiles",
    "SinkProgress",
    "SinkState",
    "SpoolError",
    "SpoolReader",
    "SpoolWriter",
    "StorageFaultError",
    "UnreadableFileError",
    "Usage",
    "WrongEnvironmentError",
    "claim_environment",
    "confirmed",
    "event_id",
    "intact",
    "lasting",
    "load_ahead",
    "pending",
    "prepare_apart",
    "presentable",
    "readable",
    "refuse_backlog",
    "row_crc",
    "set_aside",
    "sink_path",
    "spool_path",
    "wrong_owner",
]
