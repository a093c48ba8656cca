"""The entry point of the command `moe-dispatch`."""

import contextlib
import sys


def app() -> None:
    """Run `moe-dispatch`. Its version alone is printed without loading what parses the commands."""
    if sys.argv[1:] in (["--version"], ["-V"]):
        from moe_dispatch.system.version import installed_version

        with contextlib.suppress(AttributeError, OSError):  # there is no stdout, or a full one: the commands say so
            sys.stdout.write(f"moe-dispatch {installed_version()}\n")
            sys.stdout.flush()
            return
    from moe_dispatch.commands.app import app as commands

    commands()


if __name__ == "__main__":  # for torchrun, which runs modules
    app()
