"""Which sinks there are. A new one is a module and a line here."""

from collections.abc import Callable

from forwarder.logsink import LogSink
from forwarder.sink import Sink
from lifecycle import Settings

# The clients of the cloud are imported only where they are used: APP_ENV=LOCAL, and the
# other sink's process, save their memory.


def _pubsub(settings: Settings) -> Sink:
    from forwarder.pubsub import PubSubSink  # noqa: PLC0415 - see above

    return PubSubSink(settings)


def _bigquery(settings: Settings) -> Sink:
    from forwarder.bigquery import InsertAllSink  # noqa: PLC0415 - see above

    # The one place that knows BIGQUERY_WRITE_METHOD; the settings allow what is built.
    return {"insert_all": InsertAllSink}[settings.bigquery_write_method](settings)


SINKS: dict[str, Callable[[Settings], Sink]] = {"pubsub": _pubsub, "bigquery": _bigquery}


def build(name: str, settings: Settings) -> Sink:
    """Return the sink ``name``, or the log in its place where APP_ENV is LOCAL."""
    if settings.app_env == "LOCAL":
        return LogSink(name)
    return SINKS[name](settings)
