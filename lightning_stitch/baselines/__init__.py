"""What else the same data allow."""
