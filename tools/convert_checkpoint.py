"""`bd3 convert` under its former name."""

import sys

from bd3_scale.convert.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
