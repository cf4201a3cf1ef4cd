"""``nbdserve image``: making and looking at image files, with qemu-img's names, units and exit codes."""

from __future__ import annotations

import typer

from nbdserve.cli.image.amend import amend
from nbdserve.cli.image.check import check
from nbdserve.cli.image.commit import commit
from nbdserve.cli.image.create import create
from nbdserve.cli.image.info import info
from nbdserve.cli.image.map import map_image
from nbdserve.cli.image.raw_cow import app as raw_cow
from nbdserve.cli.image.rebase import rebase
from nbdserve.cli.image.resize import resize
from nbdserve.cli.image.snapshot import snapshot

app = typer.Typer(
    name="image",
    help="Make and look at image files, with qemu-img's options and exit codes.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("create")(create)
app.command("info")(info)
app.command("map")(map_image)
app.command("check")(check)
app.command("commit")(commit)
app.command("rebase")(rebase)
app.command("resize", context_settings={"ignore_unknown_options": True})(resize)  # -1G is a size
app.command("snapshot")(snapshot)
app.command("amend")(amend)
app.add_typer(raw_cow)
