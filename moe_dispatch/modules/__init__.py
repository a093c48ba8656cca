"""`MoELayer`, and the modules that it is made of."""
