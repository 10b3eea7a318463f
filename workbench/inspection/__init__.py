"""Measurements on a run that do not change it."""
