"""One objective a file. `registry.py` lists them and says how to add one; `state.py` holds what they read."""
