"""Pictures and pages of runs: curves, run reports, comparisons, heat maps."""
