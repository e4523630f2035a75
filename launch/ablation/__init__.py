"""`ligature ablate`: arms with the same seeds, compared in pairs."""
