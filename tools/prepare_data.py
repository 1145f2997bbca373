"""`bd3 prepare` under its former name."""

import sys

from bd3_scale.prepare import main

if __name__ == "__main__":
    sys.exit(main())
