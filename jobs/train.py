"""Train a reward model: `ray job submit --working-dir . -- python jobs/train.py --help`."""

import sys
from pathlib import Path

# `ray job submit` runs this file from the working directory; nothing needs to be installed there.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from raywards.cli import run, train

if __name__ == "__main__":
    sys.exit(run(train, sys.argv[1:]))
