"""`house/recall`: its text, its tokenizer, its training and its measurements."""
