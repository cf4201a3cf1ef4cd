"""Apple disk images."""
