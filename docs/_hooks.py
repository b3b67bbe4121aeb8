"""What the site has beside docs/: pages of the repository that lie elsewhere, and a reference page for each module."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PACKAGES = ("biomass_jax", "data_prep")
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "launch/README.md": "launch.md",
}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")


def page_of(path: str) -> str:
    """Where the repository's file `path` stands in the site: modules as reference, other files as text."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.endswith(".py") and path.startswith(PACKAGES):
        return f"reference/{path.removesuffix('.py').removesuffix('/__init__')}.md"
    return PAGES.get(path, f"files/{path}.md")


def links(text: str, folder: str) -> set[str]:
    """Files of the repository that a page in its folder `folder` links to."""
    return {posixpath.normpath(posixpath.join(folder, target)) for target in LINK.findall(text)}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what doesn't lie in docs/: README and its like, each module's reference, each file that is linked to."""
    sources = {path: (ROOT / path).read_text(encoding="utf-8") for path in PAGES}
    for file in files.documentation_pages():
        if file.src_uri.endswith(".md"):
            sources[f"docs/{file.src_uri}"] = file.content_string
    linked = set().union(*(links(text, posixpath.dirname(path)) for path, text in sources.items()))
    for path, page in PAGES.items():
        files.append(File.generated(config, page, content=sources[path]))
    modules = [file.relative_to(ROOT).as_posix() for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    for path in modules:
        name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        files.append(File.generated(config, page_of(path), content=f"---\ntitle: {name}\n---\n\n::: {name}\n"))
    for path in sorted(linked - set(modules)):
        if (ROOT / path).is_file() and page_of(path).startswith("files/"):
            text = (ROOT / path).read_text(encoding="utf-8")
            fenced = f"# {path}\n\n````{'python' if path.endswith('.py') else 'text'}\n{text}\n````\n"
            files.append(File.generated(config, page_of(path), content=text if path.endswith(".md") else fenced))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Point links at the places that the files have in the site."""
    here = page.file.src_uri
    origin = {place: path for path, place in PAGES.items()}.get(here, f"docs/{here}")

    def target(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), found[1]))
        return posixpath.relpath(page_of(path), posixpath.dirname(here) or ".") if (ROOT / path).is_file() else found[1]

    return LINK.sub(target, markdown)
