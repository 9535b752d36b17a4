"""What a failed end-to-end test shows: the last words of every process that it ran."""

import os
from collections.abc import Generator

import pytest
from hypothesis import settings

import lifecycle.program
from tests.harness import last_words

# How long an example takes is the machine's business, and a busy one is no failure; what hangs is
# ended by pytest's own limit. What has failed can be tried again as it was drawn.
settings.register_profile("sluice", deadline=None, print_blob=True)
settings.load_profile("sluice")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the logs to the report of what failed."""
    report = yield
    if report.failed:
        report.sections += last_words()
    return report


@pytest.fixture(autouse=True, scope="session")
def _cores_stay_as_they_are() -> Generator[None]:
    """A program that a test runs in this very process must not set a limit for all that follow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lifecycle.program, "_leave_no_core", lambda: None)
        yield


@pytest.fixture(autouse=True)
def _umask_stays_as_it_is() -> Generator[None]:
    """A program that a test runs in this very process sets its own, for all that follow."""
    before = os.umask(0o022)
    yield
    os.umask(before)
