"""One head a file: its loss, its fine-tuning and its scoring. `registry.py` lists them and says how to add one."""
