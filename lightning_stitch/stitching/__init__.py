"""Activations, stitches and how they are fitted."""
