"""Starting ranks: on this machine, on a list of hosts, under SLURM."""
