"""The front door: the `ligature` command, local runs, SLURM, planning. Importing it imports no torch."""
