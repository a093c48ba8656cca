"""The commands of `moe-dispatch`, one file each; heavy imports happen inside them."""
