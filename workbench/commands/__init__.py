"""What the commands of ``kvw`` do; :mod:`workbench.cli` declares them. Nothing here is imported before it is needed."""
