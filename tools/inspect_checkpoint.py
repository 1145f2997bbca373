"""`bd3 inspect` under its former name."""

import sys

from bd3_scale.inspect import main

if __name__ == "__main__":
    sys.exit(main())
