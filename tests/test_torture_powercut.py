"""No power cut loses a message; and the suite that says so finds what it should."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spool import event_id
from tests.harness import COMMIT_DELAYS_MS
from tests.torture.broken import MUTATIONS
from tests.torture.images import Disk
from tests.torture.powercut import (
    DATABASES,
    IMAGES_A_REVIVAL,
    SECOND_CUTS_A_REVIVAL,
    Report,
    images_of,
    judged,
    run,
    try_recording,
)
from tests.torture.recording import NoStraceError, Recording, record
from tests.torture.revival import revive
from tests.torture.syscalls import Event, Kind, merged
from tests.torture.verdict import Wrong, judge
from tests.torture.witness import Truth, acknowledged

IMAGES = int(os.environ.get("SLUICE_TORTURE_IMAGES", "300"))
SEED = int(os.environ.get("SLUICE_TORTURE_SEED", "1"))
MUTANTS_IMAGES = 60
MUTANTS_MESSAGES = 400
DIRECTORY = "/spool"
SECTOR = 512

FOUND = {
    "synchronous=NORMAL": Wrong.LOST,
    "PUBACK before COMMIT": Wrong.LOST,
    "prune past the slowest cursor": Wrong.PRUNED,
    "cursor before confirmation": Wrong.UNCONFIRMED,
    "journal after sending": Wrong.UNJOURNALLED,
}
COMMITTING = {"synchronous=NORMAL", "PUBACK before COMMIT"}
"""What is broken where readings gather, and has to be found whether they do or not."""

FOUND_BY_A_SECOND_CUT = {
    "journal forgotten once read": Wrong.UNJOURNALLED,
    "log folded in without syncs": Wrong.UNREADABLE,
}


def traced(what: Callable[..., Any], *arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - stands for any function
    """Call it; skip the test where system calls cannot be logged."""
    try:
        return what(*arguments, **options)
    except NoStraceError as error:
        pytest.skip(str(error))


@pytest.mark.timeout(120 + IMAGES)
def test_no_power_cut_loses_a_message() -> None:
    report = traced(run, IMAGES, SEED)
    assert not report.violations, str(report)
    assert report.images == IMAGES
    # What was recorded has what the images are to be about: promises, commits, checkpoints.
    assert report.acked >= report.messages
    assert report.revived >= IMAGES // IMAGES_A_REVIVAL
    assert report.unrecorded < report.revived
    assert report.second == (report.revived - report.unrecorded) * SECOND_CUTS_A_REVIVAL
    assert report.revived_twice
    assert set(report.delays) == set(COMMIT_DELAYS_MS)
    assert report.pruned > report.messages / 4
    for database in DATABASES:
        # Making the file writes some fifteen pages; what is beyond them comes of checkpoints.
        assert report.writes[database] > 20
        # A commit is at least four: two pages, each with the header of its frame. The forwarder to
        # BigQuery gathers, so it has the fewest.
        assert report.writes[f"{database}-wal"] > 200


@pytest.mark.parametrize(
    ("mutation", "commit_delay_ms"),
    [(name, delay) for name in MUTATIONS for delay in COMMIT_DELAYS_MS[name not in COMMITTING :]],
)
def test_a_broken_build_is_found(mutation: str, commit_delay_ms: str) -> None:
    report = Report(SEED)
    chance = random.Random(SEED)  # noqa: S311 - no secret
    traced(
        try_recording,
        report,
        MUTANTS_IMAGES,
        chance,
        messages=MUTANTS_MESSAGES,
        change=mutation,
        commit_delay_ms=commit_delay_ms,
    )
    found = {violation.wrong for _, violation in report.violations}
    assert FOUND[mutation] in found, str(report)


@pytest.fixture(scope="module")
def lagging(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recording, dict[str, bytes], Truth]:
    """A recording, and an image of the moment when BigQuery was furthest behind."""
    scratch = tmp_path_factory.mktemp("strace")
    chance = random.Random(SEED)  # noqa: S311 - no secret
    recording = traced(record, scratch, MUTANTS_MESSAGES, chance, calm=True)
    truths = [recording.witness.truth(event.at) for event in recording.events]
    behind = [len(truth.acked) - truth.through["bigquery"] for truth in truths]
    cut = behind.index(max(behind))
    assert behind[cut] > 100
    made = Disk(recording.directory, DATABASES)
    for event in recording.events[: cut + 1]:
        made.apply(event)
    return recording, made.cut(chance), truths[cut]


@pytest.mark.parametrize(
    ("lost", "wrong"),
    [
        ("", set()),
        ("spool.db", {Wrong.NOT_DELIVERED, Wrong.SUMS}),
        ("bigquery.db", {Wrong.REPEATED}),
    ],
)
def test_what_the_real_processes_make_of_an_image_is_judged(
    lagging: tuple[Recording, dict[str, bytes], Truth],
    lost: str,
    wrong: set[Wrong],
    tmp_path: Path,
) -> None:
    recording, files, truth = lagging
    left = {name: content for name, content in files.items() if name.partition("-")[0] != lost}
    found = revive(left, truth, recording, tmp_path).violations
    assert {violation.wrong for violation in found} == wrong, found


@pytest.mark.parametrize(("mutation", "wrong"), [("", None), *FOUND_BY_A_SECOND_CUT.items()])
def test_a_build_that_is_broken_in_its_recovery_is_found_by_a_second_cut(
    lagging: tuple[Recording, dict[str, bytes], Truth],
    mutation: str,
    wrong: Wrong | None,
    tmp_path: Path,
) -> None:
    recording, files, truth = lagging
    second = revive(files, truth, recording, tmp_path, change=mutation).recording
    assert second is not None
    chance = random.Random(SEED)  # noqa: S311 - no secret
    # Each of them: what is missing may be missing between two events only.
    happened = enumerate(second.events, 1)
    cuts = [n for n, event in happened if Path(event.path).name.removesuffix("-wal") in DATABASES]
    found = {
        violation.wrong
        for cut, left in images_of(second, cuts, chance, files)
        for violation in judged(left, second.witness.truth(second.events[cut - 1].at))
    }
    assert found == set() if wrong is None else wrong in found


@pytest.mark.parametrize("name", DATABASES)
def test_a_damaged_file_is_found(
    lagging: tuple[Recording, dict[str, bytes], Truth], name: str, tmp_path: Path
) -> None:
    _, files, truth = lagging
    for damaged in (False, True):
        directory = tmp_path / str(damaged)
        directory.mkdir()
        for file, content in files.items():
            (directory / file).write_bytes(content)
        if damaged:
            (directory / name).write_bytes(b"garbage" * 1_000)
            (directory / f"{name}-wal").unlink(missing_ok=True)
        found = {violation.wrong for violation in judge(directory, truth)}
        assert (Wrong.UNREADABLE in found) is damaged, found


def disk(*events: tuple[Kind, str, bytes, int]) -> Disk:
    made = Disk(DIRECTORY, ["spool.db"])
    for kind, name, data, number in events:
        made.apply(Event(0.0, kind, f"{DIRECTORY}/{name}".rstrip("/"), data, number))
    return made


def images(made: Disk, count: int = 200) -> list[dict[str, bytes]]:
    return [made.cut(random.Random(n)) for n in range(count)]  # noqa: S311 - no secret


OLD, NEW = b"o" * 3 * SECTOR, b"n" * 3 * SECTOR
CREATED = (
    (Kind.WRITE, "spool.db", OLD, 0),
    (Kind.SYNC_BEGINS, "spool.db", b"", 1),
    (Kind.SYNC_ENDS, "spool.db", b"", 1),
)
NAMED = ((Kind.SYNC_BEGINS, "", b"", 2), (Kind.SYNC_ENDS, "", b"", 2))


def test_what_was_synced_is_in_every_image() -> None:
    assert images(disk(*CREATED, *NAMED)) == [{"spool.db": OLD}] * 200


def test_a_file_whose_directory_was_not_synced_may_be_missing() -> None:
    found = images(disk(*CREATED))
    assert {} in found
    assert {"spool.db": OLD} in found


def test_a_later_write_is_there_missing_or_torn_at_sectors() -> None:
    found = {
        image["spool.db"]
        for image in images(disk(*CREATED, *NAMED, (Kind.WRITE, "spool.db", NEW, 0)))
    }
    sectors = {
        tuple(content[at : at + SECTOR] for at in range(0, len(OLD), SECTOR)) for content in found
    }
    assert {OLD, NEW} < found
    assert len(found) == 2**3
    assert {part for content in sectors for part in content} == {
        OLD[:SECTOR],
        NEW[:SECTOR],
    }


def test_a_write_during_a_sync_is_not_synced_by_it() -> None:
    begun = (*CREATED, *NAMED, (Kind.SYNC_BEGINS, "spool.db", b"", 3))
    written = (*begun, (Kind.WRITE, "spool.db", NEW, 0), (Kind.SYNC_ENDS, "spool.db", b"", 3))
    assert {"spool.db": OLD} in images(disk(*written))


def test_a_later_truncation_or_unlinking_happened_or_not() -> None:
    found = images(disk(*CREATED, *NAMED, (Kind.TRUNCATE, "spool.db", b"", 7)))
    assert {image["spool.db"] for image in found} == {OLD, OLD[:7]}
    found = images(disk(*CREATED, *NAMED, (Kind.UNLINK, "spool.db", b"", 0)))
    assert {len(image) for image in found} == {0, 1}


FAILED = (
    (Kind.SYNC_BEGINS, "spool.db", b"", 3),
    (Kind.SYNC_FAILS, "spool.db", b"", 3),
    (Kind.SYNC_BEGINS, "spool.db", b"", 4),
    (Kind.SYNC_ENDS, "spool.db", b"", 4),
)


def test_what_a_failed_sync_dropped_is_not_made_durable_by_a_later_one() -> None:
    written = (*CREATED, *NAMED, (Kind.WRITE, "spool.db", NEW, 0), *FAILED)
    found = {image["spool.db"] for image in images(disk(*written))}
    assert {OLD, NEW} < found
    # But what is written in its place, and synced, is there.
    again = (
        (Kind.WRITE, "spool.db", NEW[:SECTOR], SECTOR),
        (Kind.SYNC_BEGINS, "spool.db", b"", 5),
        (Kind.SYNC_ENDS, "spool.db", b"", 5),
    )
    found = {image["spool.db"] for image in images(disk(*written, *again))}
    assert {content[SECTOR : 2 * SECTOR] for content in found} == {NEW[:SECTOR]}
    assert {content[:SECTOR] for content in found} == {OLD[:SECTOR], NEW[:SECTOR]}
    assert {content[2 * SECTOR :] for content in found} == {OLD[:SECTOR], NEW[:SECTOR]}


def test_a_log_is_read_call_by_call_even_where_threads_interrupt_each_other(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    wal, socket = "/spool/spool.db-wal", "TCP:[127.0.0.1:1->127.0.0.1:2]"
    path = "".join(f"\\x{byte:02x}" for byte in wal.encode())
    log.write_text(
        f'11  10.000001 openat(AT_FDCWD<\\x2f>, "{path}", O_RDWR|O_CREAT, 0640) = 4<{path}> <0.1>\n'
        f'11  10.000002 pwrite64(4<{path}>, "\\x41\\x42", 2, 24 <unfinished ...>\n'
        f'12  10.000003 sendto(5<{socket}>, "\\x40", 1, 0, NULL, 0) = 1 <0.1>\n'
        "11  10.000004 <... pwrite64 resumed>) = 2 <0.000002>\n"
        f"11  10.000005 fdatasync(4<{path}>) = 0 <0.500000>\n"
        f"11  10.600000 fdatasync(4<{path}>) = -1 EIO (Input/output error) <0.500000>\n"
        f"11  10.700000 ftruncate(4<{path}>, 32) = 0 <0.1>\n",
        encoding="ascii",
    )
    assert [(e.kind, e.path, e.data, round(e.at, 6)) for e in merged([log])] == [
        (Kind.CREATE, wal, b"", 10.000001),
        (Kind.WRITE, wal, b"AB", 10.000002),
        (Kind.SEND, socket, b"@", 10.000003),
        (Kind.SYNC_BEGINS, wal, b"", 10.000005),
        (Kind.SYNC_ENDS, wal, b"", 10.500005),
        (Kind.SYNC_BEGINS, wal, b"", 10.6),
        (Kind.TRUNCATE, wal, b"", 10.7),
        (Kind.SYNC_FAILS, wal, b"", 11.1),
    ]
    assert [e.number for e in merged([log]) if e.kind in {Kind.WRITE, Kind.TRUNCATE}] == [24, 32]


def test_a_puback_means_the_last_message_of_its_identifier() -> None:
    def publish(payload: bytes, mid: int) -> bytes:
        body = b"\0\1t" + mid.to_bytes(2, "big") + payload
        return bytes([0x32, len(body)]) + body

    stream = publish(b"first", 1) + publish(b"second", 2) + publish(b"third", 1)
    said = [
        Event(1.0, Kind.RECEIVE, "c", stream[:5]),
        Event(2.0, Kind.RECEIVE, "c", stream[5:]),
        Event(3.0, Kind.SEND, "c", b"\xc0\0\x40\2\0\2\x40\2\0"),
        Event(4.0, Kind.SEND, "c", b"\1"),
    ]
    assert list(acknowledged(said)) == [
        (3.0, event_id(b"t", b"second")),
        (4.0, event_id(b"t", b"third")),
    ]
