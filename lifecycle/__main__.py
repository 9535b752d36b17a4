"""``python -m lifecycle``: the event listener ``restarter`` of supervisord.conf."""

import os
import socket
import sys
from collections.abc import Sequence

from lifecycle import ExitCode, configure_logging, leave, tell_version
from lifecycle.restarter import serve


def main(arguments: Sequence[str] = ()) -> ExitCode:
    """Run the restarter until supervisord ends."""
    if arguments:
        return tell_version("lifecycle", arguments)
    # Standard output belongs to supervisord's protocol.
    configure_logging("restarter", stream=sys.stderr)
    try:
        serve(dict(os.environ), socket.gethostname())
    except BrokenPipeError:
        return ExitCode.CLEAN  # supervisord has ended
    return ExitCode.CLEAN


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
