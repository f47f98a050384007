"""Forwards on CPUs: recorded graphs, packed weights, rows over cores, giving way to decodes."""
