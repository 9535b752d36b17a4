"""The contract with the supervisor: settings, logs, shutdown, exit codes, one-instance lock.

A program of Sluice is a body that is handed its settings and a stop request; everything
between it and the process table is here, once, for all of them. This package imports no
sibling, so the spool can be used without it and it without the spool.
"""

from lifecycle.delays import PUBSUB_GATHER_S, bigquery_gather_s
from lifecycle.environment import EnvironmentFileError, merged_environment
from lifecycle.exitcodes import ExitCode
from lifecycle.identity import Identity, SessionId, read_identity, write_identity
from lifecycle.instance import AlreadyRunningError, InstanceLock
from lifecycle.logs import configure_logging, fields, log_notice, printable, unlimited
from lifecycle.program import Program, leave, run
from lifecycle.rate_limited_log import RateLimitedLog
from lifecycle.settings import SINKS, Settings, SettingsError, load_settings
from lifecycle.shutdown import StopRequest
from lifecycle.version import VERSION, tell_version
from lifecycle.watchdog import Watchdog

__all__ = [
    "PUBSUB_GATHER_S",
    "SINKS",
    "VERSION",
    "AlreadyRunningError",
    "EnvironmentFileError",
    "ExitCode",
    "Identity",
    "InstanceLock",
    "Program",
    "RateLimitedLog",
    "SessionId",
    "Settings",
    "SettingsError",
    "StopRequest",
    "Watchdog",
    "bigquery_gather_s",
    "configure_logging",
    "fields",
    "leave",
    "load_settings",
    "log_notice",
    "merged_environment",
    "printable",
    "read_identity",
    "run",
    "tell_version",
    "unlimited",
    "write_identity",
]
