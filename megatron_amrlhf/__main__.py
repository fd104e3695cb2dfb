"""``python -m megatron_amrlhf``."""

import sys

from megatron_amrlhf.cli import main

sys.exit(main())
