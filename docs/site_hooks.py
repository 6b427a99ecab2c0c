"""Hooks of the site (mkdocs.yml): which pages it has in each language, and where their links lead.

The files are written for GitHub: pages link to files outside docs/, and the Chinese twin of NAME.md is NAME_zh.md. On
the site, English and Chinese are separate, with the same addresses below / and /zh/; README.md and others outside docs/
are pages too, and links to further files lead to the repository.
"""

import posixpath
import re
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Pages outside docs/: name on the site -> English and Chinese file.
OUTSIDE = {
    "index.md": ("README.md", "README_zh.md"),
    "formats.md": ("data/README.md", "data/README_zh.md"),
    "contributing.md": ("CONTRIBUTING.md", None),
    "changelog.md": ("CHANGELOG.md", None),
}
LANGUAGES = ("en", "zh")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^ *```")
NESTED_ITEM = re.compile(r"^( +)(?=(?:[-*]|\d+\.) )")
CODE = re.compile(r"`[^`]+`")
# Chinese text has no spaces between words, so a line break in it must not become one.
HAN_END, HAN_START = re.compile(r"[\u3001-\u9fff\uff00-\uffef]$"), re.compile(r" *[\u3001-\u9fff\uff00-\uffef]")


@cache
def pages_of(language: str) -> dict[str, str]:
    """Name of each page on the site of a language -> its file in the repository; English where there is no twin."""
    files = {name: "docs/" + name for path in ROOT.glob("docs/*.md") if not (name := path.name).endswith("_zh.md")}
    files |= {name: english for name, (english, _) in OUTSIDE.items()}
    if language == "zh":
        twins = {name: "docs/" + name.replace(".md", "_zh.md") for name in files if name not in OUTSIDE}
        twins |= {name: chinese for name, (_, chinese) in OUTSIDE.items() if chinese}
        files |= {name: twin for name, twin in twins.items() if (ROOT / twin).is_file()}
    return files


def translate(nav: list, sections: dict[str, str]) -> list:
    """The navigation with the names of its sections in another language."""
    return [
        {sections[name]: translate(pages, sections) for name, pages in item.items()} if isinstance(item, dict) else item
        for item in nav
    ]


def link_to(link: str, page: str, language: str, repository: str) -> str | None:
    """Where a link of a page leads on the site: to a page, a file of docs/, the other language, or the repository.

    Args:
        link: as it is in the file: relative to it, with or without anchor.
        page: name of the page.
        repository: address of the repository.

    Returns:
        None if the link leads nowhere. A link to a page of the other language starts with `../`.
    """
    path, mark, anchor = link.partition("#")
    source = pages_of(language)[page]
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path)) if path else source
    for other in sorted(LANGUAGES, key=lambda name: name != language):
        for name, file in pages_of(other).items():
            if file != target:
                continue
            if other == language:
                return (name if path else "") + mark + anchor
            address = "" if name == "index.md" else name.replace(".md", "/")
            up = "" if page == "index.md" else "../"
            return f"{up}{'../' if language == 'zh' else './zh/'}{address}{mark}{anchor}"
    if not (ROOT / target).exists() or target.startswith(".."):
        return None
    if target.startswith("docs/") and not target.endswith((".py", ".yaml")):
        return target.removeprefix("docs/")
    return f"{repository}/{'tree' if (ROOT / target).is_dir() else 'blob'}/main/{target}{mark}{anchor}"


def adapt(text: str, page: str, language: str, repository: str) -> str:
    """The Markdown of a file as mkdocs needs it: links, nested lists, pipes in the code of tables, Chinese paragraphs."""

    def replace(found: re.Match) -> str:
        image, label, link = found.groups()
        if re.match(r"\w+:", link) or (target := link_to(link, page, language, repository)) is None:
            return found[0]
        if target.startswith(("../", "./")):
            # As HTML, since mkdocs knows the pages of its own language only.
            return f'<a href="{target.removeprefix("./")}">{label}</a>'
        return f"{image}[{label}]({target})"

    lines, fenced = [], False
    for line in text.splitlines():
        if FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            line = NESTED_ITEM.sub(r"\1\1", line)
            if line.startswith("|"):
                line = CODE.sub(lambda code: code[0].replace("\\|", "|"), line)
            # A link in code is shown, not followed.
            codes = CODE.findall(line)
            line = LINK.sub(replace, CODE.sub("\0", line))
            for code in codes:
                line = line.replace("\0", code, 1)
            if HAN_START.match(line) and lines and HAN_END.search(lines[-1]) and not lines[-1].startswith("#"):
                lines[-1] += line.lstrip()
                continue
        lines.append(line)
    return "\n".join(lines) + "\n"


def github_anchor(heading: str, separator: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def on_config(config: Any) -> Any:
    """Translate the sections; make anchors as GitHub does; draw diagrams."""
    from pymdownx.superfences import fence_code_format

    if sections := config.extra.get("sections"):
        config.nav = translate(config.nav, sections)
    config.mdx_configs.setdefault("toc", {})["slugify"] = github_anchor
    # The browser loads the program that draws them from unpkg.com; without it, the text of the diagram is shown.
    diagrams = {"name": "mermaid", "class": "mermaid", "format": fence_code_format}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [diagrams]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Put the pages of this language in place of those in docs/."""
    from mkdocs.structure.files import File

    language = config.theme["language"]
    for file in list(files):
        if file.src_uri.endswith(".md"):
            files.remove(file)
    for name, source in pages_of(language).items():
        text = adapt((ROOT / source).read_text(encoding="utf-8"), name, language, config.repo_url.rstrip("/"))
        files.append(File.generated(config, name, content=text))
    return files


def on_page_context(context: Any, page: Any, config: Any, nav: Any) -> Any:
    """Let the language switch lead to the same page."""
    own = config.theme["language"]
    root = "../" if own == "zh" else ""
    config.extra["alternate"] = [
        {"name": name, "lang": lang, "link": (page.url if lang == own else f"{root}{prefix}{page.url}") or "./"}
        for name, lang, prefix in (("English", "en", ""), ("中文", "zh", "zh/"))
    ]
    return context
