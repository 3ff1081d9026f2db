"""``python -m psl_flower.config``: write anew what is made from the definitions of the keys."""

import sys

from psl_flower.config.written import main

if __name__ == "__main__":
    sys.exit(main())
