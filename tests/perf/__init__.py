"""Speed of this server beside qemu-nbd and nbdkit: the same client on the same data, printed as ratios."""
