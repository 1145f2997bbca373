"""`bd3 plot` under its former name."""

import sys

from bd3_scale.plot import main

if __name__ == "__main__":
    sys.exit(main())
