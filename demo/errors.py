"""The one error of the demo."""


class DemoError(Exception):
    """The demo cannot go on. The message says what happened and what to do next."""
