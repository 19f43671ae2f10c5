"""Shows files of the repository that the pages link to as pages of the site.

On GitHub a link to `../qvd_jax/kernels/int8.py` leads to the file. The site has no such file, so
here the file becomes a page and the link leads to that. MkDocs calls the two hooks.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)")
_PREFIX = "source/"
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".ipynb": "json"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each file outside of the documentation that a page links to."""
    waiting = [(page.src_uri, page.content_string) for page in files.documentation_pages()]
    while waiting:
        place, text = waiting.pop()
        for link in _LINK.findall(text):
            target = _target(place, link)
            name = _site_place(target)
            if name and name.startswith(_PREFIX) and name not in files.src_uris:
                content = _content(target)
                files.append(File.generated(config, name, content=content))
                waiting.append((name, content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the links of a page to where their targets are on the site."""
    place = page.file.src_uri

    def turn(found: re.Match[str]) -> str:
        name = _site_place(_target(place, found[1]))
        return found[1] if name is None else os.path.relpath(name, Path(place).parent)

    return _LINK.sub(turn, markdown)


def _target(place: str, link: str) -> str:
    """The path from the repository's root of what a page links to."""
    origin = place.removeprefix(_PREFIX) if place.startswith(_PREFIX) else f"docs/{place}"
    return os.path.normpath(Path(origin).parent / link)


def _site_place(target: str) -> str | None:
    """Where on the site a file of the repository is; None where there is no such file."""
    path = _ROOT / target
    if not path.exists():
        return None
    if target.startswith("docs/") and path.is_file():
        return target.removeprefix("docs/")
    return _PREFIX + target + ("" if path.suffix == ".md" else ".md")


def _content(target: str) -> str:
    """A file of the repository, or the names in a folder of it, as Markdown."""
    path = _ROOT / target
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    # Else the site's search would find more code than documentation.
    title = f"---\nsearch: {{exclude: true}}\n---\n\n# `{target}`\n\n"
    if path.is_dir():
        names = sorted(child.name for child in path.iterdir() if child.name[0] not in "._")
        return title + "".join(f"- [{name}]({path.name}/{name})\n" for name in names)
    fence = "`" * 6
    language = _LANGUAGES.get(path.suffix, "text")
    return f"{title}{fence}{language}\n{path.read_text(encoding='utf-8')}\n{fence}\n"
