"""How each sink is built. A new one is a module, a line here and its settings.

Which sinks there are says :data:`lifecycle.SINKS`.
"""

from collections.abc import Callable

from forwarder.logsink import LogSink
from forwarder.sink import Sink
from lifecycle import PUBSUB_GATHER_S, Settings
from spool import SinkState

# The clients of the cloud are imported only where they are used: APP_ENV=LOCAL, and the
# other sink's process, save their memory.


def _pubsub(settings: Settings, state: SinkState) -> Sink:
    from forwarder.pubsub import PubSubSink  # noqa: PLC0415 - see above

    return PubSubSink(settings, state)


def _bigquery(settings: Settings, state: SinkState) -> Sink:
    # The one place that knows BIGQUERY_WRITE_METHOD.
    if settings.bigquery_write_method == "insert_all":
        from forwarder.bigquery import InsertAllSink  # noqa: PLC0415 - see above

        return InsertAllSink(settings, state)
    if settings.bigquery_write_method == "storage_default":
        from forwarder.defaultstream import DefaultStreamSink  # noqa: PLC0415 - see above

        return DefaultStreamSink(settings, state)
    from forwarder.storage import StorageSink  # noqa: PLC0415 - see above

    return StorageSink(settings, state)


BUILDERS: dict[str, Callable[[Settings, SinkState], Sink]] = {
    "pubsub": _pubsub,
    "bigquery": _bigquery,
}


def build(name: str, settings: Settings, state: SinkState) -> Sink:
    """Return the sink ``name``, or the log in its place where APP_ENV is LOCAL.

    Args:
        name: One of :data:`BUILDERS`.
        settings: Where to deliver, and how.
        state: The sink's own file.
    """
    if settings.app_env == "LOCAL":
        return LogSink(name, PUBSUB_GATHER_S)
    return BUILDERS[name](settings, state)
