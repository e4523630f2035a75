"""Shard folders on disk and behind a URL: manifests, tar members, samples and their captions."""
