"""``python -m megatron_amrlhf``."""

import importlib
import sys

from megatron_amrlhf.errors import EXIT_INTERRUPTED


def main() -> int:
    """The command line, loaded in here: Ctrl-C has no traceback while it loads either."""
    try:
        return importlib.import_module("megatron_amrlhf.cli").main()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
