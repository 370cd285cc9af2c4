"""Adaptive SVD on an unmodified nanochat checkout."""
