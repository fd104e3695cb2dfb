"""``python -m megatron_amrlhf``."""

import sys

from megatron_amrlhf.interrupts import load


def main() -> int:
    """The command line, loaded in here: Ctrl-C has no traceback while it loads either."""
    return load("megatron_amrlhf.cli").main()


if __name__ == "__main__":
    sys.exit(main())
