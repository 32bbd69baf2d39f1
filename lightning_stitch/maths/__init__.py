"""Similarity and regression of rows."""
