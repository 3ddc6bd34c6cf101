"""What mkdocs.yml builds the site of beside docs/: the pages of the root, and links that lead out of docs/."""

import re
from pathlib import Path
from posixpath import relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# Pages of the root, by the names that the site has for them.
FROM_ROOT = {
    "index.md": "README.md",
    "architecture.md": "ARCHITECTURE.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "license.txt": "LICENSE",
    "notice.txt": "NOTICE",
}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s:]+)\)")
IMAGE = re.compile(r"(!\[[^\]]*\]\()([^)\s:]+)(\))")
FENCE = re.compile(r"^(```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take the root's pages in."""
    for name, source in FROM_ROOT.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to where the site has their targets; a file that it does not have is named, and not linked."""
    sources = {Path(file.abs_src_path).resolve(): file.src_uri for file in files if file.abs_src_path}
    here = Path(str(page.file.abs_src_path)).resolve().parent

    def target(link: str) -> str | None:
        path, hash_, anchor = link.partition("#")
        found = (here / path).resolve() if path else None
        if found is None or not found.exists():
            return link  # within the page, or broken: strict mode tells
        uri = sources.get(found)
        return None if uri is None else relpath(uri, page.file.src_uri.rpartition("/")[0] or ".") + hash_ + anchor

    def linked(match: re.Match[str]) -> str:
        found = target(match[2])
        return match[1] if found is None else f"[{match[1]}]({found})"

    def drawn(match: re.Match[str]) -> str:
        return match[1] + (target(match[2]) or match[2]) + match[3]

    parts = FENCE.split(markdown)  # every second one is a block of code
    return "".join(part if number % 2 else LINK.sub(linked, IMAGE.sub(drawn, part)) for number, part in enumerate(parts))
