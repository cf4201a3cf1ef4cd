"""Long work on images, with QEMU's job states and verbs: copying, and what is made of it."""
