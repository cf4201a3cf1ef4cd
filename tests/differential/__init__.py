"""Random work on real files, against a model and against QEMU's tools.

``python -m tests.differential --rounds 100 --ops 2000`` runs it at any size.
"""
