"""`cerwu-gpu sweep` from a checkout: python scripts/sweep.py MODEL -o DIR."""

import sys
from pathlib import Path

# Instead of this folder, whose evaluate.py would shadow Hugging Face's package evaluate.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from cerwu_gpu.cli import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]])
