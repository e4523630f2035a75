"""Weights in and out: starting weights, published checkpoints, our own checkpoints, exports."""
