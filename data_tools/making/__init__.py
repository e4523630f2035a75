"""Making shard folders: writing, planning, finding duplicates, indexing tars made elsewhere, inspecting."""
