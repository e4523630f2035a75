"""Make shard folders: write and plan them, find duplicates, index tars made elsewhere, and inspect the result."""
