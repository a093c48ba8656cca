"""A calibration run: which candidates are timed, on which schedule, in which process."""
