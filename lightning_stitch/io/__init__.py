"""Downloads, tensor files, activations that wait on disk."""
