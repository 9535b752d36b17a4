"""No delay costs throughput or fills a broker's queue, whatever its window and its distance."""

from collections.abc import Iterator

import pytest

from tests.window_model import Plant, bursts, poisson

QUEUE_MAX = 1_000
"""Mosquitto's max_queued_messages, beyond which it drops."""

DELAYS_S = (0.05, 0.2, 0.5, 1.0)
RUN_S = 12.0


@pytest.mark.parametrize("delay_s", DELAYS_S)
@pytest.mark.parametrize("way_s", [0.0005, 0.02])
@pytest.mark.parametrize("window", [1, 5, 20, 100, 1_000])
@pytest.mark.parametrize("rate", [10, 50, 200, 1_000])
def test_no_delay_costs_throughput_and_commits_are_few(
    rate: int, window: int, way_s: float, delay_s: float
) -> None:
    at_once = Plant(window, 0.0, way_s).run(poisson(rate), RUN_S)
    plant = Plant(window, delay_s, way_s).run(poisson(rate), RUN_S)
    assert plant.stored >= 0.9 * at_once.stored - rate * delay_s
    if at_once.queued_most < QUEUE_MAX // 5:
        assert plant.queued_most < QUEUE_MAX // 2
    if rate * delay_s < 0.8 * window and rate * delay_s > 1:
        assert plant.commits_per_s(RUN_S / 2) <= 1.1 / delay_s + 0.5


@pytest.mark.parametrize("delay_s", DELAYS_S)
@pytest.mark.parametrize("window", [5, 20, 100, 1_000])
@pytest.mark.parametrize(
    ("size", "every_s"),
    [(200, 1.0), (10, 0.05), (10, 0.01), (50, 0.1)],
)
def test_sensors_that_send_in_bursts(
    size: int, every_s: float, window: int, delay_s: float
) -> None:
    plant = Plant(window, delay_s).run(bursts(size, every_s), RUN_S)
    sent = (RUN_S - 0.5) / every_s * size
    assert plant.stored >= 0.95 * sent - size - delay_s * size / every_s
    assert plant.queued_most < QUEUE_MAX // 2
    if window > 4 * size * delay_s / every_s:
        assert plant.commits_per_s(RUN_S / 2) <= max(2.0 / every_s, 4.0 / delay_s)


@pytest.mark.parametrize("delay_s", DELAYS_S)
@pytest.mark.parametrize(("window", "rate"), [(1, 400), (5, 1_000), (20, 1_000), (100, 4_000)])
def test_a_rate_that_rises_at_once_finds_no_wait_that_lets_a_queue_overflow(
    window: int, rate: int, delay_s: float
) -> None:
    def sent() -> Iterator[float]:
        for at_s in poisson(10):
            if at_s > RUN_S / 2:
                break
            yield at_s
        yield from poisson(rate, RUN_S / 2)

    plant = Plant(window, delay_s).run(sent(), RUN_S)
    assert plant.queued_most < QUEUE_MAX // 2
    assert plant.gathering.window == window


@pytest.mark.parametrize("delay_s", DELAYS_S)
@pytest.mark.parametrize("every_s", [2, 5])
def test_a_broker_that_does_not_always_keep_to_its_window(every_s: int, delay_s: float) -> None:
    plant = Plant(20, delay_s, lax=lambda now_s: now_s % every_s < 0.05)
    plant.run(poisson(1_000), RUN_S)
    assert plant.queued_most < QUEUE_MAX // 2
    assert plant.stored >= 0.95 * 1_000 * (RUN_S - delay_s)


@pytest.mark.parametrize("delay_s", DELAYS_S)
@pytest.mark.parametrize("windows", [(1_000, 5), (5, 1_000), (20, 1)])
def test_after_a_reconnect_the_other_brokers_window_counts(
    windows: tuple[int, int], delay_s: float
) -> None:
    plant = Plant(windows[0], delay_s).run(poisson(200), RUN_S)
    plant.other_broker(windows[1])
    plant.run(poisson(200, RUN_S), 2 * RUN_S)
    assert plant.queued_most < QUEUE_MAX // 2
    assert plant.stored >= 0.95 * 200 * (2 * RUN_S - delay_s)
    if windows[1] > 200 * delay_s:
        assert plant.commits_per_s(1.5 * RUN_S) <= 1.1 / delay_s + 0.5
