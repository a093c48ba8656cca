"""What the commands of this folder have in common."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from moe_dispatch.errors import MoEDispatchError


@contextmanager
def mistakes_exit(parser: argparse.ArgumentParser) -> Iterator[None]:
    """What is wrong with what the command line names is one message, and the status 2; anything else is a bug."""
    try:
        yield
    except (MoEDispatchError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
