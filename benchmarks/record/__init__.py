"""What makes the repository's own record: shipped tables, packed calibrations, the agreement of calibrations.

Not part of the wheel.
"""
