"""`svd-launch`: clusters. Imports no torch."""
