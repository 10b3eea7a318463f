"""Eviction: which entries of the cache stay. Method cards: one file each."""
