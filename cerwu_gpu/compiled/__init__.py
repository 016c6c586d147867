"""The CPU forms of the operations, compiled by numba; `reference` defines what they compute."""
