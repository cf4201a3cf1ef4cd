"""``nbdserve image``: making, copying and looking at image files, with qemu-img's names, units and exit codes."""
