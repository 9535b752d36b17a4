"""Keys that are revoked, run out or are replaced, and servers that are not who they say."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from tests.harness import FORWARDERS, wait_until
from tests.torture.cloud_faults import METHODS
from tests.torture.google import HOSTS, Earnest, earnest
from tests.torture.tls_gate import Authority
from tests.torture.token_server import REFRESHED_EARLY_S, TOKEN, Mood

READINGS = 50
SOON_S = 30.0


@pytest.fixture
def system(tmp_path: Path) -> Iterator[Earnest]:
    with earnest(tmp_path) as made:
        yield made


def publish(system: Earnest) -> None:
    system.rig.publish(READINGS)
    system.rig.wait_until_spooled()


def wait_until_seen(system: Earnest, state: str, words: str) -> None:
    """Wait until the operator sees of both sinks why they stand still."""
    for sink in system.rig.sinks:

        def seen(sink: str = sink) -> bool:
            row = system.rig.books.backlog(sink)
            return row["state"] == state and words in row["detail"]

        wait_until(seen, SOON_S, f"{sink} is {state}: {words}")


def assert_delivered(system: Earnest) -> None:
    system.rig.wait_until_delivered()
    system.rig.assert_nothing_lost()


@pytest.mark.parametrize("method", METHODS)
def test_a_key_that_is_refused_is_a_hold_that_ends_by_itself_once_it_is_good(
    tmp_path: Path, method: str
) -> None:
    with earnest(tmp_path, method) as system:
        system.tokens.mood = Mood.REVOKED
        system.rig.start()
        publish(system)
        wait_until_seen(system, "on hold", "GOOGLE_APPLICATION_CREDENTIALS")
        assert all(system.rig.programs[name].running for name in FORWARDERS)
        assert system.rig.cloud.received("pubsub") == []
        system.tokens.mood = Mood.GOOD
        assert_delivered(system)


def test_a_key_that_is_revoked_while_it_runs_stops_delivery_and_loses_nothing(
    system: Earnest,
) -> None:
    # Each token is old after a second.
    system.tokens.lives_s = REFRESHED_EARLY_S + 1
    system.rig.start()
    publish(system)
    assert_delivered(system)
    system.tokens.mood = Mood.REVOKED
    asked = system.tokens.asked

    def held() -> bool:
        # A token that is still good is used up first. The call that appends to BigQuery stays
        # open with the token that opened it: whether it may is the service's to decide.
        system.rig.publish(1)
        return bool(system.rig.books.backlog("pubsub")["state"] == "on hold")

    wait_until(held, SOON_S, "it is on hold")
    assert system.tokens.asked > asked
    system.tokens.mood = Mood.GOOD
    assert_delivered(system)


def test_a_clock_that_is_wrong_is_told_with_the_command_that_shows_it(system: Earnest) -> None:
    system.tokens.mood = Mood.SKEWED
    system.rig.start()
    publish(system)
    wait_until_seen(system, "on hold", "reasonable timeframe")
    wait_until_seen(system, "on hold", "timedatectl")
    system.tokens.mood = Mood.GOOD
    assert_delivered(system)


@pytest.mark.parametrize("mood", [Mood.BROKEN, Mood.GONE])
@pytest.mark.parametrize("method", METHODS)
def test_a_token_server_that_is_away_is_waited_for_as_any_network(
    tmp_path: Path, method: str, mood: Mood
) -> None:
    with earnest(tmp_path, method) as system:
        system.tokens.mood = mood
        system.rig.start()
        publish(system)
        wait_until_seen(system, "retrying", "")
        if mood is Mood.GONE:  # the other takes longer than these forwarders' deadline
            wait_until_seen(system, "retrying", "no access token")
        system.tokens.mood = Mood.GOOD
        assert_delivered(system)


def test_a_token_server_that_goes_while_tokens_are_renewed_is_no_hold(system: Earnest) -> None:
    # Each token is old after a second.
    system.tokens.lives_s = REFRESHED_EARLY_S + 1
    system.rig.start()
    publish(system)
    assert_delivered(system)
    system.tokens.mood = Mood.GONE

    def waiting() -> bool:
        system.rig.publish(1)
        return "no access token" in str(system.rig.books.backlog("pubsub")["detail"])

    wait_until(waiting, SOON_S, "it waits for a token")
    assert system.rig.books.backlog("pubsub")["state"] == "retrying"
    system.tokens.mood = Mood.GOOD
    assert_delivered(system)


@pytest.mark.parametrize("method", METHODS)
def test_a_key_that_was_bad_from_the_start_is_replaced_without_a_restart(
    tmp_path: Path, method: str
) -> None:
    with earnest(tmp_path, method) as system:
        system.tokens.revoked.add("first")
        system.rig.start()
        publish(system)
        wait_until_seen(system, "on hold", "GOOGLE_APPLICATION_CREDENTIALS")
        system.tokens.make_key(system.key_file, "second")
        assert_delivered(system)


@pytest.mark.parametrize("method", METHODS)
def test_a_new_key_in_the_old_ones_file_is_used_without_a_restart(
    tmp_path: Path, method: str
) -> None:
    with earnest(tmp_path, method) as system:
        # Each token is old after a second.
        system.tokens.lives_s = REFRESHED_EARLY_S + 1
        system.rig.start()
        publish(system)
        assert_delivered(system)
        system.tokens.revoked.add("first")

        def held() -> bool:
            # A token that is still good is used up first; a call stays open with the token that
            # opened it.
            system.gate.hang_up()
            system.rig.publish(1)
            rows = [system.rig.books.backlog(sink) for sink in system.rig.sinks]
            return all(row["state"] == "on hold" for row in rows)

        wait_until(held, SOON_S, "both sinks are on hold")
        wait_until_seen(system, "on hold", "GOOGLE_APPLICATION_CREDENTIALS")
        system.tokens.make_key(system.key_file, "second")
        assert_delivered(system)


@pytest.mark.parametrize(
    ("wrong", "words", "remedy"),
    [
        (
            "authority",
            "unable to get local issuer certificate (issuer CN=stranger",
            "CLOUD_CA_FILE",
        ),
        ("name", "is refused: ", "a proxy, a firewall or a login page"),
        ("age", "certificate has expired", "timedatectl"),
        ("not yet", "certificate is not yet valid", "timedatectl"),
    ],
)
def test_a_server_that_is_not_google_gets_no_reading_and_no_token(
    tmp_path: Path, wrong: str, words: str, remedy: str
) -> None:
    with earnest(tmp_path) as system:
        good = system.gate.context
        authority, age = system.authority, timedelta()
        names: tuple[str, ...] = HOSTS
        if wrong == "authority":
            authority = Authority(tmp_path, "stranger")
        elif wrong == "name":
            names = tuple(f"{host}.example" for host in HOSTS)
        else:
            age = timedelta(days=3 if wrong == "age" else -3)
        system.show(authority.issue(wrong, *names, age=age))
        system.rig.start()
        publish(system)
        wait_until_seen(system, "on hold", words)
        wait_until_seen(system, "on hold", remedy)
        # gRPC looks at the name only after the handshake, and then leaves.
        hosts = {text.partition(":")[0] for text in system.gate.refused} | {*system.gate.accepted}
        assert {"pubsub.googleapis.com", "bigquery.googleapis.com"} <= hosts
        assert TOKEN.encode() not in bytes(system.gate.heard)
        assert system.gate.heard == b"", "nothing was said to it"
        system.gate.context = good
        assert_delivered(system)
