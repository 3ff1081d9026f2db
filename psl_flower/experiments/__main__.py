"""Run ``python -m psl_flower.experiments``."""

import sys

from psl_flower.experiments.command import main

if __name__ == "__main__":
    sys.exit(main())
