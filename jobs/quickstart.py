"""The whole way on one machine, in a few minutes: `make demo`."""

import sys
from pathlib import Path

# `ray job submit` runs this file from the working directory; nothing needs to be installed there.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from raywards.cli import quickstart, run

if __name__ == "__main__":
    sys.exit(run(quickstart, sys.argv[1:]))
