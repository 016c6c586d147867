"""Models as a compression run has them: weights, norms, and the adapter of any torch module."""
