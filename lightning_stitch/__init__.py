"""Compose a new network from fragments of pre-trained ones, in seconds, without back-propagation."""

__version__ = "0.1.0"
