"""The commands of `ligature`, one a file, each with its parser and a `run(arguments)`. `launch/table.py` lists them."""
