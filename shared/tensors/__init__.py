"""Tensors on their way from the process that computes them to the one that reads them."""
