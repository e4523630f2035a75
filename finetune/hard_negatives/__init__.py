"""Altered captions and images that VLDeformer and matching are trained against."""
