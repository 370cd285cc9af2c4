"""Sequence tasks that make their own data, batch by batch, with held-out sequences that training never sees."""
