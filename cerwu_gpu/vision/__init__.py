"""Plain torch modules and vision networks: convolutions as matrices, hooks, no transformers."""
