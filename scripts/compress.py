"""`cerwu-gpu compress` from a checkout: python scripts/compress.py MODEL -o OUT."""

import sys
from pathlib import Path

# Instead of this folder, whose evaluate.py would shadow Hugging Face's package evaluate.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from cerwu_gpu.cli import main

if __name__ == "__main__":
    main(["compress", *sys.argv[1:]])
