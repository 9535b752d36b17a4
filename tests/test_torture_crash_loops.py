"""Crash loops under the real supervisord with the shipped configuration: the short version."""

import pytest

from tests.torture import crash_loops


@pytest.mark.parametrize("fault", ["kill loop", "wrong settings", "full log disk"])
def test_a_crash_loop_that_ends_needs_no_operator(fault: str) -> None:
    """Programs that supervisord has given up run again; a wrong setting does not loop."""
    if fault not in crash_loops.FAULTS:
        pytest.skip("needs root")
    report = crash_loops.run(1, 1, only=fault)
    assert report.violations == []
    assert report.counts[fault] == 1
