"""raw-cow: a raw file as a copy-on-write layer."""
