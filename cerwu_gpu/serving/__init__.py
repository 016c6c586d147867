"""Compressed directories at work: loading, transformers' own door, compressed memory, the Hub."""
