"""nbdserve: a network block server for disk image chains."""

__version__ = "0.1.0"
