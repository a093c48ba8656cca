"""From one call to a running backend: checks, planning, first runs, and recovery."""
