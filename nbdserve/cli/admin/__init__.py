"""``nbdserve admin``: the verbs of the admin socket, for people."""
