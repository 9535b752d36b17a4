"""``select * from health`` is empty while all is well, and has a row for each thing that is wrong.

As the operator sees it: by the sqlite3 shell, with real processes, signals and files.
"""

import signal
import sqlite3
from contextlib import closing

from tests.harness import COLLECTOR, Rig, wait_until
from tests.harness.cloud import TOPIC_PATH

NOTICED_S = 60.0
"""A collector is silent 40 s after its last sign of life."""

PUBSUB, BIGQUERY = "forwarder-pubsub", "forwarder-bigquery"


def health(rig: Rig, name: str = "spool") -> list[dict[str, str]]:
    return rig.books.as_operator("select * from health", name)


def problems(rig: Rig) -> set[tuple[str, str, str]]:
    return {(row["subject"], row["name"], row["severity"]) for row in health(rig)}


def wait_for(rig: Rig, *wanted: tuple[str, str, str]) -> None:
    seen: list[set[tuple[str, str, str]]] = []

    def there() -> bool:
        seen.append(problems(rig))
        return seen[-1] == set(wanted)

    wait_until(there, NOTICED_S, f"health shows {wanted}")


def row(rig: Rig, name: str) -> dict[str, str]:
    return next(r for r in health(rig) if r["name"] == name)


def test_each_process_that_is_missing_is_told_and_its_return_as_well() -> None:
    with Rig() as rig:
        rig.start()
        rig.publish(100)
        rig.wait_until_delivered()
        wait_for(rig)
        wait_until(lambda: _delivering(rig), NOTICED_S, "the snapshot says so")
        line = rig.books.backlog("pubsub")
        assert (line["mode"], line["health"]) == ("DEV", "ok")
        assert line["broker"].startswith("connected since ")

        stopped, suspended = rig.programs[BIGQUERY], rig.programs[PUBSUB]
        assert stopped.stop()[0] == 0
        suspended.signal(signal.SIGSTOP)
        wait_for(
            rig,
            ("bigquery", "forwarder_stopped", "CRITICAL"),
            ("pubsub", "forwarder_silent", "CRITICAL"),
        )
        remedy = row(rig, "forwarder_stopped")["remedy"]
        assert remedy.startswith("supervisorctl start forwarder-bigquery")
        assert rig.books.backlog("bigquery")["state"] == "stopped"
        assert rig.books.backlog("pubsub")["state"] == "silent"
        suspended.signal(signal.SIGCONT)
        stopped.start()
        wait_for(rig)

        collector = rig.programs[COLLECTOR]
        collector.signal(signal.SIGSTOP)
        # Only the collector: no look at the forwarders says nothing of them.
        wait_for(rig, ("collector", "collector_silent", "CRITICAL"))
        assert str(collector.pid) in row(rig, "collector_silent")["detail"]
        line = rig.books.backlog("pubsub")
        assert line["state"] == "unknown"
        assert "the collector is silent; delivering as of " in line["detail"]
        collector.signal(signal.SIGCONT)
        wait_for(rig)

        assert collector.stop()[0] == 0
        wait_for(rig, ("collector", "collector_stopped", "CRITICAL"))
        assert rig.books.backlog("pubsub")["broker"] == "collector stopped"
        rig.start(COLLECTOR)
        wait_for(rig)


def _delivering(rig: Rig) -> bool:
    return str(rig.books.backlog("pubsub")["state"]) == "delivering"


def test_a_collector_that_cannot_start_is_silent_although_all_else_runs() -> None:
    with Rig() as rig:
        rig.start()
        rig.publish(10)
        rig.wait_until_delivered()
        collector = rig.programs[COLLECTOR]
        collector.kill()
        # FATAL in supervisorctl: it ends at each start, before it touches a file.
        collector.environment["MQTT_PORT"] = "none"
        assert _ends(rig) == 78
        wait_for(rig, ("collector", "collector_silent", "CRITICAL"))


def _ends(rig: Rig) -> int:
    collector = rig.programs[COLLECTOR]
    collector.start()
    return collector.wait()


def test_a_sink_on_hold_and_one_that_never_came_up_are_told() -> None:
    with Rig() as rig:
        rig.start(COLLECTOR, PUBSUB)
        wait_for(rig, ("bigquery", "forwarder_silent", "CRITICAL"))
        assert "has not run here" in row(rig, "forwarder_silent")["detail"]
        rig.cloud.pubsub.delete_topic(TOPIC_PATH)
        rig.publish(1)
        wait_for(
            rig,
            ("bigquery", "forwarder_silent", "CRITICAL"),
            ("pubsub", "sink_on_hold", "CRITICAL"),
        )
        assert "NOT_FOUND" in row(rig, "sink_on_hold")["detail"]
        assert [r["name"] for r in health(rig, "pubsub")] == ["sink_on_hold"]


def test_a_forwarder_of_an_older_release_is_no_delivering_one() -> None:
    with Rig(BIGQUERY_ENABLED="false") as rig:
        rig.start()
        rig.publish(1)
        rig.wait_until_delivered("pubsub")
        assert rig.programs[PUBSUB].stop()[0] == 0
        # As a file of format 4 is, whose forwarder has not come up since.
        with closing(sqlite3.connect(rig.spool_dir / "pubsub.db")) as file:
            file.execute("DROP VIEW health")
            file.execute("DROP TABLE beat")
            file.commit()
        wait_for(rig, ("pubsub", "forwarder_silent", "CRITICAL"))
        assert rig.books.backlog("pubsub")["state"] == "silent"


def test_a_crash_loop_is_told_although_each_start_is_a_sign_of_life() -> None:
    with Rig(BIGQUERY_ENABLED="false") as rig:
        rig.start()
        rig.publish(10)
        rig.wait_until_delivered("pubsub")
        assert rig.programs[PUBSUB].stop()[0] == 0
        # A cursor beyond the spool's end, as after a restored copy: refused at each start.
        with closing(sqlite3.connect(rig.spool_dir / "pubsub.db")) as file:
            file.execute("UPDATE cursor SET seq = 1000000")
            file.commit()
        forwarder = rig.programs[PUBSUB]
        forwarder.start()
        assert forwarder.wait() == 78
        wait_for(rig, ("pubsub", "forwarder_failed", "CRITICAL"))
        assert "1000000" in row(rig, "forwarder_failed")["detail"]


def test_what_local_logged_is_not_counted_as_delivered_after_a_switch() -> None:
    with Rig(APP_ENV="LOCAL") as rig:
        rig.start()
        rig.publish(50)
        rig.wait_until_delivered()
        wait_until(lambda: _shows(rig, "LOCAL: logged, not sent", 0, 50), 15, "what was logged")
        for name in (COLLECTOR, PUBSUB, BIGQUERY):
            assert rig.programs[name].stop()[0] == 0
            rig.programs[name].environment["APP_ENV"] = "DEV"
        rig.start()
        rig.publish(7)
        wait_until(lambda: _shows(rig, "DEV", 7, 50), 30, "what was delivered")
        assert len(rig.cloud.received("pubsub")) == 7


def _shows(rig: Rig, mode: str, delivered: int, logged: int) -> bool:
    wanted = {"mode": mode, "delivered": delivered, "logged": logged}
    lines = rig.books.as_operator("select mode, delivered, logged from backlog")
    return bool(lines) and all(line == wanted for line in lines)


def test_health_is_instant_with_many_readings() -> None:
    """No view reads the readings: a query plan without a scan of them."""
    with Rig() as rig:
        rig.start(COLLECTOR)
        plan = rig.books.rows("spool", "EXPLAIN QUERY PLAN SELECT * FROM health")
        assert plan
        assert not [step for step in plan if "reading_row" in step[3] or "rejected" in step[3]]
