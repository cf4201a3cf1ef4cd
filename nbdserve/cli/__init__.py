"""The command lines."""

from __future__ import annotations

import os

# For numpy, which would start a thread per processor, for algebra; it looks when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
