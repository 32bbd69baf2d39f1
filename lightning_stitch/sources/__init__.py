"""Finding, checking and loading networks."""
