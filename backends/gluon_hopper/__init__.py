"""Warp-specialised grouped products for Hopper, written in Gluon: middle and large M."""
