"""`bd3 convert` under its former name."""

from bd3_scale.convert.__main__ import main
from bd3_scale.program import run_program

if __name__ == "__main__":
    run_program(main)
