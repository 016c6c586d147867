"""Checkpoints of transformers models on disk: tensors, their names, and config.json."""
