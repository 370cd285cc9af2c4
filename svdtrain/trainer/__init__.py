"""The training loop and its hook engine. Knows nothing of SVD."""
