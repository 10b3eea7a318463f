"""Schemes: how entries of one side (keys or values) become codes, scales and the like, and come back."""
