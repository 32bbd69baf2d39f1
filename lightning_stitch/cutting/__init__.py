"""From a module to a graph that can be cut."""
