"""Images: sources, decoding, the order of batches, codes."""
