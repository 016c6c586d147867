"""`python -m cerwu_gpu` is the command `cerwu-gpu`."""

from cerwu_gpu.cli import main

if __name__ == "__main__":
    main()
