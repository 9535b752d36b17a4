"""``python -m lifecycle``: the event listener ``restarter`` of supervisord.conf."""

import os
import socket
import sys

from lifecycle import ExitCode, configure_logging, leave
from lifecycle.restarter import serve


def main() -> ExitCode:
    """Run the restarter until supervisord ends."""
    # Standard output belongs to supervisord's protocol.
    configure_logging("restarter", stream=sys.stderr)
    try:
        serve(dict(os.environ), socket.gethostname())
    except BrokenPipeError:
        return ExitCode.CLEAN  # supervisord has ended
    return ExitCode.CLEAN


if __name__ == "__main__":
    leave(main())
