"""What stands between a disk and those who use it: keeping a moment of it, showing that, holding requests back."""
