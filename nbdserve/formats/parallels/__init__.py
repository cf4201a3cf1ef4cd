"""Parallels expandable images."""
