"""Warp-specialised grouped products for Hopper, written in Gluon."""
