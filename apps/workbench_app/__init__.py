"""The app of KV Workbench: views and a controller around `workbench`; everything shown is computed there."""
