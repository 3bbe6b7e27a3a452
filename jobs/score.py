"""Score a JSONL file: `python jobs/score.py --model EXPORT --input IN --output OUT`."""

import sys
from pathlib import Path

# `ray job submit` runs this file from the working directory; nothing needs to be installed there.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from raywards.cli import run, score

if __name__ == "__main__":
    sys.exit(run(score, sys.argv[1:]))
