"""What makes the repository's own record: shipped tables, packed calibrations, measurements. Not part of the wheel."""
