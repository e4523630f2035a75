"""Read images once and in order: collections for scoring, galleries for indexing."""
