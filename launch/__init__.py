"""Fifth floor: the front door. The `ligature` command, local runs, SLURM, planning. Importing it imports no torch."""
