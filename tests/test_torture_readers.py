"""Readers left open, garbage in small spools, a full temporary directory: the short version."""

import os
import time

import pytest

from tests.torture import garbage, pinned_readers, tmpdir

SEED = int(os.environ.get("SLUICE_SEED", str(time.time_ns() % 2**32)))
PINNED_ROUNDS = int(os.environ.get("SLUICE_PINNED_ROUNDS", "2"))
GARBAGE_ROUNDS = int(os.environ.get("SLUICE_GARBAGE_ROUNDS", "2"))
TMPDIR_ROUNDS = int(os.environ.get("SLUICE_TMPDIR_ROUNDS", "4"))


@pytest.mark.timeout(PINNED_ROUNDS * 90 + 60)
def test_a_reader_left_open_loses_nothing() -> None:
    report = pinned_readers.run(PINNED_ROUNDS, SEED)
    print(report)  # noqa: T201 - pytest shows it with a failure
    assert report.violations == []
    assert report.counts["readers"] >= PINNED_ROUNDS


@pytest.mark.timeout(GARBAGE_ROUNDS * 90 + 60)
def test_garbage_takes_no_room_from_readings() -> None:
    report = garbage.run(GARBAGE_ROUNDS, SEED)
    print(report)  # noqa: T201 - the same
    assert report.violations == []
    assert report.counts["given up"] > 0


@pytest.mark.timeout(TMPDIR_ROUNDS * 60 + 60)
def test_a_temporary_directory_without_room_does_not_matter() -> None:
    try:
        report = tmpdir.run(TMPDIR_ROUNDS, SEED)
    except PermissionError as error:
        pytest.skip(str(error))
    print(report)  # noqa: T201 - the same
    assert report.violations == []
    assert report.rounds == TMPDIR_ROUNDS
