"""Captioned scenes of coloured shapes, drawn on this machine: the demo's own data."""
