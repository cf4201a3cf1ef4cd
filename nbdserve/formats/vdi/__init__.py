"""VDI, VirtualBox's disk image."""
