"""``python -m megatron_amrlhf``."""

import sys

from megatron_amrlhf.interrupts import loading


def main() -> int:
    """The command line, loaded in here: Ctrl-C has no traceback while it loads either."""
    with loading():
        from megatron_amrlhf.cli import main as run  # noqa: PLC0415 - heavy
    return run()


if __name__ == "__main__":
    sys.exit(main())
