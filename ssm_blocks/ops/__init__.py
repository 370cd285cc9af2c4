"""Scans, structured matrices and chunked recurrences in plain torch. Time is dimension 1, states are [..., K, V]."""
