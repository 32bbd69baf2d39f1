"""What a recipe describes, as modules."""
