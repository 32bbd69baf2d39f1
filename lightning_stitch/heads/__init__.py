"""Closed-form heads."""
