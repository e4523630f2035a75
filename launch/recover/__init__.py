"""Keeping a run alive: nodes are checked before it starts, and its state is read from its folder and from SLURM."""
