"""Methods to compare with: the paper's settings, its rate model, and NNCodec."""
