"""Shard folders on disk and behind a URL: the manifest, tar members, samples and their captions."""
