"""The demo's own data: captioned scenes of coloured shapes, drawn on this machine."""
