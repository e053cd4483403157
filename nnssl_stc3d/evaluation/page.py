"""HTML pages that hold everything they show, in one file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape


def section(title: str, body: str, note: str = "") -> str:
    """A part of a page.

    Args:
        title: headline, escaped here.
        body: HTML.
        note: text below the headline, escaped here.
    """
    return f"<section><h2>{escape(title)}</h2>{f'<p>{escape(note)}</p>' if note else ''}{body}</section>"


def picture(png: bytes, description: str) -> str:
    """An image inside the page.

    Args:
        png: content of a PNG file.
        description: for those who cannot see it.
    """
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'


def render_page(title: str, verdict: str, caveat: str, facts: Mapping[str, str], sections: Sequence[str]) -> str:
    """A whole page.

    Args:
        title: headline.
        verdict: the result in a sentence.
        caveat: what it does not say.
        facts: name -> value, such as numbers of cases.
        sections: of :func:`section`.
    """
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return _PAGE.format(
        title=escape(title),
        verdict=escape(verdict),
        caveat=escape(caveat),
        facts=listed,
        sections="\n".join(sections),
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1d2129; background: #fff; max-width: 68rem; margin: 2rem auto;
padding: 0 1rem; }}
h1 {{ font-size: 1.7rem; margin-bottom: .2rem; }}
h2 {{ font-size: 1.2rem; margin-top: 2.4rem; border-bottom: 1px solid #dde1e6; padding-bottom: .2rem; }}
.verdict {{ font-size: 1.15rem; font-weight: 600; }}
.caveat {{ background: #fff6e0; border-left: 4px solid #d99a00; padding: .6rem 1rem; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; }}
dt {{ color: #5b6470; }} dd {{ margin: 0; }}
table {{ border-collapse: collapse; margin: .8rem 0; display: block; overflow-x: auto; }}
td {{ white-space: nowrap; }}
th, td {{ padding: .25rem .9rem; text-align: right; font-variant-numeric: tabular-nums; }}
th:first-child {{ text-align: left; font-weight: 400; }}
thead th {{ border-bottom: 2px solid #1d2129; font-weight: 600; }}
tr.mean > * {{ border-top: 1px solid #1d2129; font-weight: 600; }}
.gain {{ color: #0a7a3d; }} .loss {{ color: #b3261e; }}
img {{ max-width: 100%; height: auto; display: block; margin: .8rem 0; }}
pre {{ background: #f4f6f8; padding: .8rem 1rem; overflow-x: auto; font-size: .8rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="verdict">{verdict}</p>
<p class="caveat">{caveat}</p>
<dl>{facts}</dl>
{sections}
</body>
</html>
"""
