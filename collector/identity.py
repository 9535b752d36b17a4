"""Which session the broker keeps for this collector, and what is told when that changes."""

import logging
from collections.abc import Sequence

import msgspec

from lifecycle import (
    Identity,
    SessionId,
    Settings,
    fields,
    read_identity,
    write_identity,
)

CLIENT_ID_PREFIX = "sluice-"
"""The default client id is this and the instance id (lifecycle/settings.py)."""

log = logging.getLogger("collector")


class KeptIdentity:
    """Compares the settings with what is kept, and keeps what is used.

    Args:
        settings: Of this start.
        remembered: Broker, port, client id and filters of the last subscription, from spool.db;
            empty if there is none. Releases before identity.json have kept no more than that.
        chosen: Whether INSTANCE_ID or MQTT_CLIENT_ID is set. What is set is obeyed.
    """

    def __init__(self, settings: Settings, remembered: Sequence[object], *, chosen: bool) -> None:
        self._directory = settings.spool_dir
        kept = read_identity(settings.spool_dir)
        noted = _noted(remembered)
        if kept is None and noted is not None and not chosen:
            settings = _adopted(settings, noted.client_id)
        self.settings = settings
        """Those of the start, with the ids that are used."""
        self._session = SessionId(settings.mqtt_client_id, settings.mqtt_broker, settings.mqtt_port)
        before = kept.session if kept is not None and kept.session is not None else noted
        if kept is not None and kept.instance_id != settings.instance_id:
            log.warning(
                "INSTANCE_ID has changed: it is the source in rows and events from now on",
                extra=fields(before=kept.instance_id, now=settings.instance_id),
            )
        former = kept.former if kept is not None else ()
        self._kept = kept
        self._next = Identity(instance_id=settings.instance_id, session=before, former=former)
        # Two notes of one session: the disk may have taken one of them and not the other.
        if before is not None and self._session not in {before, noted}:
            # Kept once the broker grants the new session: until then every start tells it, and
            # what is not set stays as it was.
            _tell_moved(before, self._session)
        elif before is not None:
            self.subscribed()
        else:
            self._keep(self._next)

    def subscribed(self) -> None:
        """Note that the broker now keeps the session of these settings."""
        self._keep(self._next.moved_to(self._session))

    def _keep(self, identity: Identity) -> None:
        if identity == self._kept:
            return
        self._kept = identity
        try:
            write_identity(self._directory, identity)
        except OSError as error:
            # The ids in use are right; only a changed host name would change them meanwhile.
            log.warning(
                "cannot keep the identity; will retry at the next start",
                extra=fields(directory=str(self._directory), error=str(error)),
            )


def _noted(remembered: Sequence[object]) -> SessionId | None:
    match remembered:
        case [str(broker), int(port), str(client_id), *_]:
            return SessionId(client_id, broker, port)
        case _:
            return None


def _adopted(settings: Settings, client_id: str) -> Settings:
    """Return the settings with the ids of the last run, of a release that kept no file."""
    instance_id = settings.instance_id
    if client_id.startswith(CLIENT_ID_PREFIX):
        instance_id = client_id.removeprefix(CLIENT_ID_PREFIX)
    if (client_id, instance_id) != (settings.mqtt_client_id, settings.instance_id):
        log.warning(
            "the ids of the last run are kept, although the host name is another",
            extra=fields(client_id=client_id, instance_id=instance_id),
        )
    return msgspec.structs.replace(settings, mqtt_client_id=client_id, instance_id=instance_id)


def _tell_moved(before: SessionId, now: SessionId) -> None:
    old = f"{before.broker}:{before.port}"
    log.warning(
        "the MQTT session has changed; the broker may hold messages for the old one",
        extra=fields(
            old_client_id=before.client_id,
            old_broker=old,
            client_id=now.client_id,
            broker=f"{now.broker}:{now.port}",
            remedy=(
                f"messages that came while the collector was away, and all that come since, wait "
                f"in the session {before.client_id} on {old}. To fetch them: set "
                f"MQTT_CLIENT_ID={before.client_id}, MQTT_BROKER={before.broker}, "
                f"MQTT_PORT={before.port} again, restart the collector, wait until its counter "
                f"'received' keeps to the present rate, and only then change them. To discard "
                f"them: mosquitto_sub -h {before.broker} -p {before.port} -i {before.client_id} "
                f"-t unused -E"
            ),
        ),
    )
