"""`python -m qwen_fast.cli`, where the `qwen-fast` script is not on the path."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
