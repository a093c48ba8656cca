"""Decode without tensor cores: each slot reads its expert's weights straight into registers."""
