"""What the broker has queued survives a changed identity: the short version of the long run."""

from tests.torture import identity


def test_a_changed_identity_leaves_nothing_in_the_broker() -> None:
    report = identity.run(len(identity.CHANGES), 1)
    assert report.violations == []
    assert all(report.counts[change] == 1 for change in identity.CHANGES)
    assert report.counts["queued"] == 2000
