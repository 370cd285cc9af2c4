"""`svd-monitor`: the live view of a run. Imports no torch."""
