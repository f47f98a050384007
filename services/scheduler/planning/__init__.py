"""From a view of one device to a plan for it: values in, values out."""
