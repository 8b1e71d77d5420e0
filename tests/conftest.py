"""The environment of all tests: no network, no tracker's server, no display, a sane number of threads."""

from __future__ import annotations

import os

# Before torch and the hub's libraries are imported, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))  # tiny models lose time on more
