"""One file a command of `ligature`; launch/table.py lists them."""
