"""The commands of ``nbdserve image``: a copy needs none of what a check does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import typer

from nbdserve.cli.lazy import CONTEXT, LazyGroup, Place


def _place(module: str, help_: str, name: str | None = None, **settings: Any) -> Place:
    return Place(f"nbdserve.cli.image.{module}", name or module, help_, settings)


class ImageCommands(LazyGroup):
    """One module each, beside this one."""

    places: ClassVar[Mapping[str, Place]] = {
        "create": _place("create", "Make an image. A file that is there is replaced, unless it is in use."),
        "convert": _place(
            "convert",
            "Copy the disk of an image into a new image, of any format, or keep it a copy-on-write image of BASE.",
        ),
        "compare": _place(
            "compare", "Look whether two images have the same content; the longer one may go on with zeroes."
        ),
        "dd": _place("dd", "Copy a part of the disk of an image to a new image, which has the size of that part."),
        "measure": _place(
            "measure", "Print how much room a new image takes, made of another, or of nothing, before it is made."
        ),
        "bench": _place("bench", "Measure how long a sequence of reads, or writes, of an image takes."),
        "info": _place(
            "info", "Print what an image is: format, sizes, backing file, snapshots. The backing file stays closed."
        ),
        "map": _place(
            "map", "Print where the data of an image is: in which file of its chain, and at which offset.", "map_image"
        ),
        "check": _place("check", "Look whether the metadata of an image are consistent."),
        "commit": _place(
            "commit", "Write what an image holds into its backing file, or into one further down, and empty the image."
        ),
        "rebase": _place(
            "rebase",
            "Give an image another backing file. Its content stays: what differs between the two is copied into it.",
        ),
        "resize": _place(
            "resize",
            "Change the size of an image's disk. What it grows by reads as zeroes; partitions stay as they are.",
            ignore_unknown_options=True,  # -1G is a size
        ),
        "snapshot": _place(
            "snapshot", "List, create, apply or delete the internal snapshots of an image that nobody is using."
        ),
        "amend": _place(
            "amend",
            "Change what was decided when an image was made: version, refcounts' width, backing file, size, "
            "passphrases.",
        ),
        "bitmap": _place("bitmap", "Change a dirty bitmap stored in an image that nobody is using.", "app"),
        "raw-cow": _place(
            "raw_cow",
            "Carry a raw-cow image to and from qcow2 with a data file, which stock tools read. Only metadata is "
            "written; afterwards use one of the two images, since neither learns what is written through the other.",
            "app",
        ),
    }


app = typer.Typer(name="image", cls=ImageCommands, no_args_is_help=True, add_completion=False, context_settings=CONTEXT)


@app.callback()
def _group() -> None:
    """Make, copy and look at image files, with qemu-img's options and exit codes."""
