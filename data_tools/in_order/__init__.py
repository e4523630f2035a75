"""Collections read once, in their own order, for scoring and for search."""
