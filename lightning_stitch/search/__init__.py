"""Space, strategies, ranking, results."""
