"""A report as one Markdown file and one HTML file that holds its pictures."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import markdown

HTML = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }}
h1, h2 {{ line-height: 1.2; margin: 2.2rem 0 0.8rem }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums }}
th, td {{ padding: 0.35rem 0.8rem; border-bottom: 1px solid #d5dae0; white-space: nowrap }}
th {{ border-bottom: 2px solid #1b1f24; text-align: left }}
td:last-child {{ white-space: normal }}
code {{ font: 0.9em ui-monospace, monospace; overflow-wrap: anywhere }}
pre {{ background: #f3f5f7; padding: 0.8rem; white-space: pre-wrap }}
img {{ max-width: 100%; height: auto }}
em {{ color: #57606a; font-style: normal; font-size: 0.9rem }}
</style>
{body}
</html>
"""


def write_page(folder: Path, text: str) -> None:
    """Write `text` (Markdown that begins with its title) as report.md, and as report.html with the pictures inside."""
    (folder / "report.md").write_text(text, encoding="utf-8")
    body = markdown.markdown(text, extensions=["tables", "fenced_code"])
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    body = re.sub(r'src="([^"]+\.png)"', lambda match: f'src="{_embedded(folder / match[1])}"', body)
    title = escape(text.partition("\n")[0].lstrip("# "))
    (folder / "report.html").write_text(HTML.format(title=title, body=body), encoding="utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, words: int = 1) -> str:
    """A Markdown table under its caption; the first `words` columns are left-aligned, the others are numbers."""
    rule = ["---" if column < words else "---:" for column in range(len(header))]
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))
    return f"*{caption}*\n\n{lines}"


def _embedded(picture: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode('ascii')}"
