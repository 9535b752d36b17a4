"""What a failed end-to-end test shows: the last words of every process that it ran."""

from collections.abc import Generator

import pytest

from tests.harness import last_words


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the logs to the report of what failed."""
    report = yield
    if report.failed:
        report.sections += last_words()
    return report
