"""Hooks of mkdocs: pages from the code itself, and links that leave the documentation."""

import re
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
# A link from a page into the repository beside the documentation.
_OUTSIDE: Final = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+)([^)#\s]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Fill in what the code says, and name files of the repository in place of links that the site cannot follow.

    Raises:
        FileNotFoundError: A page links to a file that the repository does not have.
    """
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", _commands())
    if "<!-- variables -->" in markdown:
        from moe_dispatch.settings import variables_table

        markdown = markdown.replace("<!-- variables -->", variables_table())
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def named(match: re.Match[str]) -> str:
        path = (folder / match[2] / match[3]).resolve()
        if not path.exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {match[2]}{match[3]}, which does not exist")
        if path.is_relative_to(ROOT / "docs"):
            return match[0]
        inside = path.relative_to(ROOT).as_posix()
        return f"`{inside}`" if match[1] in (inside, path.name) else f"{match[1]} (`{inside}`)"

    return _OUTSIDE.sub(named, markdown)


def _commands() -> str:
    """Every command with its arguments and options, as ``--help`` has them."""
    import typer

    from moe_dispatch.commands.app import app

    return "\n".join(_of_command(typer.main.get_command(app), "moe-dispatch", ()))


def _of_command(command: Any, name: str, before: tuple[str, ...]) -> list[str]:
    path = (*before, name)
    if subcommands := getattr(command, "commands", None):
        return [line for key, each in subcommands.items() for line in _of_command(each, key, path)]
    lines = [f"## `{' '.join(path)}`", "", command.help or "", "", "| | |", "|---|---|"]
    for parameter in command.params:
        argument = parameter.param_type_name == "argument"
        names = parameter.name.upper() if argument else ", ".join(parameter.opts)
        text = (getattr(parameter, "help", "") or "").replace("|", "\\|").replace("\n", " ")
        lines.append(f"| `{names}` | {text} |")
    return [*lines, ""]
