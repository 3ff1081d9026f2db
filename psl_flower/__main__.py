"""Run ``python -m psl_flower``."""

import sys

from psl_flower.cli import main

if __name__ == "__main__":
    sys.exit(main())
