"""Folders, cards, repositories."""
