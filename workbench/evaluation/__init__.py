"""Prompts whose answers can be checked, each with the place of its evidence."""
