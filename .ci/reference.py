"""The reference pages of the site, made from the six groups of the public names: hooks of mkdocs and of griffe."""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "piggyback_lens"
PAGES = ("models", "values", "measuring", "experiments", "directions", "training")
"""File names of the groups, in their order."""


def groups() -> dict[str, tuple[str, list[str]]]:
    """Title and full names of every group, by the name of its page; the two namespaces are the last."""
    text = (PACKAGE / "__init__.pyi").read_text(encoding="utf-8")
    _, *parts = re.split(r"^# (?!ruff)(.*)$", text, flags=re.MULTILINE)
    found = {}
    for page, title, body in zip(PAGES, parts[::2], parts[1::2], strict=True):
        found[page] = title, [".".join(pair) for pair in re.findall(r"^from (\S+\.\S+) import (\w+) as", body, re.M)]
    saes = (PACKAGE / "saes" / "__init__.py").read_text(encoding="utf-8")
    imports = re.findall(r"^from (\S+) import (.*)$", saes, re.MULTILINE)
    names = [f"{module}.{name.strip()}" for module, line in imports for name in line.split(",")]
    found["saes"] = "Sparse autoencoders (piggyback_lens.saes, extra sae)", names
    engines = [f"piggyback_lens.engines.{name}" for name in ("local", "ray", "slurm")]
    found["engines"] = "Where cells run (piggyback_lens.engines)", engines
    return found


def on_files(files: Files, config: Any) -> Files:
    """Add a page for every group (called by mkdocs)."""
    for page, (title, names) in groups().items():
        where = f"piggyback_lens.{page}" if page in ("engines", "saes") else "piggyback_lens"
        lead = f"# {title}\n\nEach of these is imported from `{where}`.\n\n"
        text = lead + "\n".join(f"::: {name}\n" for name in names)
        files.append(File.generated(config, f"reference/{page}.md", content=text))
    return files


HOMES = {name.rpartition(".")[2]: name for _, names in groups().values() for name in names}
"""Where each public name is defined, which is its anchor on the site."""


class Docstrings(griffe.Extension):
    """Reads our docstrings as griffe wants them: `Example:` is `Examples:`, and public names in backticks are links."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change a docstring (called by griffe for every object that it has read)."""
        if obj.docstring:
            text = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"(?<![`\w])`(\w+)`(?![`\w])", self._link, text)

    def _link(self, found: re.Match[str]) -> str:
        return f"[{found[0]}][{HOMES[found[1]]}]" if found[1] in HOMES else found[0]
