"""Models out: a checkpoint in a format that another library loads, with a model card."""
