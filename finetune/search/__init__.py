"""Image search with a checkpoint: embedding a collection, answering a query, showing the answer."""
