"""What mkdocs does beyond its settings: pages whose text stands outside docs/, and links that leave docs/.

The Markdown files are written for a git host, where a link is a path in the repository. On the site, README.md and its
like are pages as well, and any other file that a page links to is copied, so that the same links work in both places.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Iterator

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {  # path in the repository -> page of the site
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "RELEASING.md": "releasing.md",
    "dataset/README.md": "datasets.md",
}
COPIES = "repository"  # folder of the site for files that are no pages
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>(?:~[\w.]*\.)?([^<]+)</code>")  # of Sphinx, in docstrings
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)\s]*)?\))")


def on_files(files, config):
    """Add the pages of :data:`PAGES`, and what any page links to outside docs/."""
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    texts = {page.src_uri: page.content_string for page in files.documentation_pages()}
    for target in sorted({target for uri, text in texts.items() for target in outside(uri, text)}):
        files.append(File.generated(config, f"{COPIES}/{target}", abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links between places of the repository into links between places of the site."""

    def turned(found: re.Match) -> str:
        target = place(found[2], page.file.src_uri)
        start = posixpath.dirname(page.file.src_uri)
        return f"{found[1]}{posixpath.relpath(site_path(target), start or '.')}{found[3]}"

    return LINK.sub(turned, markdown)


def on_page_content(html, page, config, files):
    """Docstrings as people read them: a role is its name, and the `::` before an example is gone."""
    return ROLE.sub(r"<code>\1</code>", html).replace("<p>::</p>", "").replace("::</p>", ":</p>")


def place(link: str, uri: str) -> str:
    """The path in the repository that a link on the page ``uri`` leads to."""
    sources = {name: source for source, name in PAGES.items()}
    return posixpath.normpath(posixpath.join(posixpath.dirname(sources.get(uri, f"docs/{uri}")), link))


def site_path(target: str) -> str:
    """Where a file of the repository is on the site, from its root."""
    if target in PAGES:
        return PAGES[target]
    return target[len("docs/") :] if target.startswith("docs/") else f"{COPIES}/{target}"


def outside(uri: str, text: str) -> Iterator[str]:
    """Files outside docs/ that a page links to and that are no pages themselves."""
    for _, link, _ in LINK.findall(text):
        target = place(link, uri)
        if target not in PAGES and not target.startswith("docs/") and (ROOT / target).is_file():
            yield target
