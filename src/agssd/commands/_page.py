"""One self-contained HTML page: nothing is fetched, in light or dark, on a phone or a wide screen."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from pathlib import Path


def page(title: str, header: str, main: str, footer: str, style: str, script: str = "") -> str:
    """Return the page.

    A policy in it lets the browser load pictures that it holds itself and run the given script alone, whatever text the
    page shows.

    Args:
        title: plain text.
        header: HTML.
        main: HTML.
        footer: HTML.
        style: CSS beyond ``_page.css``.
        script: JavaScript run at the end.
    """
    base = Path(__file__).with_name("_page.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    tag = ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
        tag = f"<script>{script}</script>\n"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{base}{style}</style>\n</head>\n<body>\n"
        f"<header>{header}</header>\n<main>{main}</main>\n<footer>{footer}</footer>\n{tag}</body>\n</html>\n"
    )
