"""Image search with a checkpoint: build an index of a collection, answer queries, write the answers as a page."""
