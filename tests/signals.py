"""Signals as a terminal's programs get them, whoever has started the tests."""

import signal


def signals_as_usual() -> None:
    """For ``preexec_fn``: what a program starts with in a terminal.

    What a shell starts in the background ignores Ctrl-C, its children too, and Bash takes no signal
    that was ignored when it started.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
