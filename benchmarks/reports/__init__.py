"""Reports that are made of benchmark rows: scoreboard, regret, tables and plots."""
