"""Showing a page: fonts, footer and limits alike wherever it is served."""

from __future__ import annotations

from typing import Any

_LARGEST = "32mb"
# Columns are as wide as a phone, whatever is in them.
_CSS = """
.gradio-container {max-width: 60rem !important; margin: 0 auto !important}
.gradio-container .column, .gradio-container .block {min-width: 0 !important; max-width: 100%}
.gradio-container > .main {box-sizing: border-box; max-width: 100vw}
"""


def serve(demo: Any, **options: Any) -> Any:
    """Serve what `demo_of` made, until Ctrl-C; in a Space the Space's server does.

    Args:
        demo: The page.
        options: Those of Gradio's `launch`, such as server_name, server_port and prevent_thread_lock.

    Returns:
        What `launch` gives: the app, its address here, its address elsewhere.
    """
    import gradio

    # Gradio's own themes fetch their fonts from a server of another company.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    settings = {"theme": theme, "css": _CSS, "footer_links": [], "max_file_size": _LARGEST, "quiet": True}
    return demo.launch(**settings | options)
