"""Measurements of a model that some methods need beforehand: they become artifacts. `kvw calibrate` makes them."""
