"""What mkdocs does to this folder beyond its settings: documents outside docs/ become pages, and links to them follow.

Documents link to each other as files of the repository, so that links work wherever the repository is read. In the site
the documents of OUTSIDE are pages of their own; links to other files outside docs/ (sources, licences) become plain
text, since the site does not have them. A link to what exists nowhere is left as it is: `--strict` refuses it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
# path in the repository → page of the site
OUTSIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
    "README.zh-CN.md": "readme-zh-cn.md",
    "src/lowbit/data/README.md": "packaged-texts.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^```.*?^```$)", flags=re.M | re.S)


def on_files(files: Any, config: Any) -> Any:
    """Adds the documents of OUTSIDE that docs/ has no page for."""
    for source, page in OUTSIDE.items():
        if files.get_file_from_path(page) is None:
            content = _relinked((ROOT / source).read_text(encoding="utf-8"), source, page)
            files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of a page of docs/ that leave the folder."""
    if page.file.generated_by:
        return markdown
    return _relinked(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Pages in Chinese say so, for the choice of fonts and for screen readers."""
    if page.file.src_uri.startswith("zh/") or page.file.src_uri == OUTSIDE["README.zh-CN.md"]:
        return output.replace('<html lang="en"', '<html lang="zh-CN"', 1)
    return output


def _relinked(markdown: str, source: str, page: str) -> str:
    """The text of the document at `source` (a path in the repository), with links as `page` of the site needs them."""

    def link(found: re.Match[str]) -> str:
        mark, text, target = found.groups()
        path, hash_, anchor = target.partition("#")
        if not path or "://" in target or target.startswith("mailto:"):
            return found[0]
        inside = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if inside in OUTSIDE:
            inside = OUTSIDE[inside]
        elif inside.startswith("docs/"):
            inside = inside.removeprefix("docs/")
        elif (ROOT / inside).exists():
            return text
        else:
            return found[0]
        return f"{mark}[{text}]({posixpath.relpath(inside, posixpath.dirname(page) or '.')}{hash_}{anchor})"

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)
