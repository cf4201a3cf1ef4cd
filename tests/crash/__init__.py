"""Power loss and kill -9: what was flushed is there, nothing shows another block's data, and leaks are the worst.

``python -m tests.crash --states 20000`` replays crash states of a recorded storage; ``python -m tests.crash.kill``
kills a real server under load, with ``--jobs`` while a live job works.
"""
