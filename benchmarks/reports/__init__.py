"""Reports that are made of benchmark rows: scoreboard, regret and plots."""
