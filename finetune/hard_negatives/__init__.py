"""Altered captions and images, which VLDeformer and matching train against."""
