"""Entry point of ``python -m psl_flower.plan``."""

import sys

from psl_flower.plan.command import main

if __name__ == "__main__":
    sys.exit(main())
