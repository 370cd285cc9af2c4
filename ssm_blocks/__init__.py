"""Seven swappable state-space sequence mixers."""
