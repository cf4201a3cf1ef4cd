"""What the admin socket can do, a module for each group of commands."""
