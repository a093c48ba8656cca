"""The calibration file: its schema, how it is merged, and what is read from it."""
