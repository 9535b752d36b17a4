"""No power cut loses what was acknowledged after a failed sync; a broken build is found."""

import os
import random

import pytest

from tests.harness import COMMIT_DELAYS_MS
from tests.torture.broken import OF_A_FAILED_SYNC
from tests.torture.failed_syncs import run, try_recording
from tests.torture.powercut import Report
from tests.torture.recording import NoStraceError
from tests.torture.verdict import Wrong

IMAGES = int(os.environ.get("SLUICE_TORTURE_IMAGES", "200"))
SEED = int(os.environ.get("SLUICE_TORTURE_SEED", "1"))
MUTANTS_IMAGES = 40


@pytest.mark.timeout(120 + IMAGES)
def test_no_power_cut_loses_a_message_that_was_acknowledged_after_a_failed_sync() -> None:
    try:
        report = run(IMAGES, SEED)
    except NoStraceError as error:
        pytest.skip(str(error))
    assert not report.violations, str(report)
    assert report.images == IMAGES
    assert report.acked >= report.messages


@pytest.mark.parametrize("commit_delay_ms", COMMIT_DELAYS_MS)
@pytest.mark.parametrize("mutation", OF_A_FAILED_SYNC)
def test_a_build_that_believes_its_log_after_a_failed_sync_is_found(
    mutation: str, commit_delay_ms: str
) -> None:
    report = Report(SEED)
    try:
        chance = random.Random(SEED)  # noqa: S311 - no secret
        try_recording(
            report, MUTANTS_IMAGES, chance, change=mutation, commit_delay_ms=commit_delay_ms
        )
    except NoStraceError as error:
        pytest.skip(str(error))
    assert Wrong.LOST in {violation.wrong for _, violation in report.violations}, str(report)
