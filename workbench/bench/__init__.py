"""The measurements behind ``kvw bench``. Speeds are ratios against plain transformers, taken in the same run."""
