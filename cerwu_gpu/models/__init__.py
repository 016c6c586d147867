"""What a model is to a compression run: its weights, its norms, and any torch module's adapter."""
