"""A batch in lanes: every row once, each site in its order, and no lane for a few rows more."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import forwarder.lanes
from forwarder.lanes import Lanes, sort_as_many_as_fit, sort_by_site
from spool import Reading
from tests.test_sink_contract import readings

REQUEST_MAX = 3


@pytest.fixture(autouse=True, scope="module")
def _small_requests() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forwarder.lanes, "REQUEST_MAX_MESSAGES", REQUEST_MAX)
        yield


def of_sites(sites: list[str]) -> list[Reading]:
    """Return a reading of each of ``sites``."""
    return [
        (*row[:4], site, *row[5:]) for row, site in zip(readings(len(sites)), sites, strict=True)
    ]


def in_lanes(batch: Lanes) -> list[Reading]:
    """Return what is sent, after a look at how."""
    sent: list[Reading] = []
    for lane in batch.lanes:
        rows = [row for request in lane.waiting for row in request.rows]
        assert rows, "a lane of nothing"
        assert len({row[4] for row in rows}) == 1
        assert all(earlier[0] < later[0] for earlier, later in pairwise(rows))
        assert all(0 < len(request.rows) <= REQUEST_MAX for request in lane.waiting)
        sent += rows
    assert len({row[4] for row in sent}) == len(batch.lanes)
    return sorted(sent)


@given(st.lists(st.sampled_from("ABCD"), max_size=40))
def test_every_row_is_in_its_lane_once(sites: list[str]) -> None:
    rows = of_sites(sites)
    batch = sort_by_site(rows)
    assert batch.rows is rows
    assert in_lanes(batch) == rows


@given(st.lists(st.sampled_from("ABCD"), max_size=40))
def test_a_batch_ends_before_the_first_row_that_others_would_wait_for(sites: list[str]) -> None:
    rows = of_sites(sites)
    batch = sort_as_many_as_fit(rows)
    assert in_lanes(batch) == batch.rows
    assert batch.rows == rows[: len(batch.rows)]
    longest = max(map(sites.count, sites), default=0)
    depth = max((len(lane.waiting) for lane in batch.lanes), default=0)
    assert depth <= max(1, longest // REQUEST_MAX)
    if len(batch.rows) == len(rows):
        assert batch.rows is rows
    else:
        left_out = sites[len(batch.rows)]
        assert sites[: len(batch.rows)].count(left_out) == depth * REQUEST_MAX


@pytest.mark.parametrize(
    ("sites", "kept"),
    [("AABB", 4), ("AABBA", 5), ("AABBAA", 5), ("AABAABAAB", 9), ("AAAAAA", 6), ("", 0)],
)
def test_the_longest_lane_is_full(sites: str, kept: int) -> None:
    assert len(sort_as_many_as_fit(of_sites(list(sites))).rows) == kept


def test_a_dead_row_behind_the_end_is_left_to_the_next_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forwarder.lanes, "KEY_MAX_BYTES", 1)
    monkeypatch.setattr(forwarder.lanes, "UNDOUBTED_CHARS", 1)
    rows = of_sites(["A", "XX", "A", "A", "A", "XX"])
    batch = sort_as_many_as_fit(rows)
    assert batch.rows == rows[:4]
    assert [letter.row for letter in batch.dead] == [rows[1]]
    assert in_lanes(batch) == [rows[0], rows[2], rows[3]]
    assert [letter.row for letter in sort_by_site(rows).dead] == [rows[1], rows[5]]
