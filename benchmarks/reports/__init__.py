"""What is made of benchmark rows: scoreboard, regret, agreement, plots."""
