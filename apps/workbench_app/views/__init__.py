"""Closer looks at one lane and head. Each is built when it is opened, and only the open one is kept up to date."""
