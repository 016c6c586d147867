"""What the method is compared with: the paper's own settings, its rate model, and NNCodec."""
