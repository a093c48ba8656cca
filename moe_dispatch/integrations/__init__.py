"""Adapters that put `moe_forward` into other people's models."""
