"""What made the house models, and how to make them again."""
