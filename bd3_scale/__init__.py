"""bd3_scale: block discrete denoising diffusion language models (BD3-LMs), trained at scale."""

import time

STARTED = time.monotonic()
"""When this process began, but for the start of the interpreter: what run.time_limit counts from. The time of the system's boot, by which
the operating system tells it, was seen shifted in containers."""
__version__ = "0.1.0"
