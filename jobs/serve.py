"""Serve a reward model: `python jobs/serve.py --model EXPORT`."""

import sys
from pathlib import Path

# `ray job submit` runs this file from the working directory; nothing needs to be installed there.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from raywards.cli import run, serve

if __name__ == "__main__":
    sys.exit(run(serve, sys.argv[1:]))
