"""How the web pages look: a theme on Gradio's tokens, a style sheet, and the script that they share."""

from pathlib import Path

import gradio as gr

ASSETS = Path(__file__).parent / "assets"
STYLE_SHEET = ASSETS / "page.css"
# The reader's own fonts: nothing is loaded from other hosts, and Chinese is drawn by a font made for it.
FONTS = ["system-ui", "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
MONOSPACE = ["ui-monospace", "SFMono-Regular", "Consolas", "Noto Sans Mono CJK SC", "monospace"]


def theme() -> gr.themes.Base:
    """Calm greys and one accent, light and dark."""
    made = gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.zinc,
        radius_size=gr.themes.sizes.radius_lg,
        spacing_size=gr.themes.sizes.spacing_md,
        text_size=gr.themes.sizes.text_md,
        font=FONTS,
        font_mono=MONOSPACE,
    )
    return made.set(
        body_background_fill="white",
        body_background_fill_dark="#18181b",
        body_text_color="#1f2328",
        body_text_color_dark="#e6e6e9",
        body_text_color_subdued="#5f6670",
        body_text_color_subdued_dark="#a1a1aa",
        background_fill_primary="white",
        background_fill_primary_dark="#18181b",
        background_fill_secondary="#f4f5f5",
        background_fill_secondary_dark="#232326",
        border_color_primary="#e2e4e6",
        border_color_primary_dark="#37373c",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_shadow="none",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_text_weight="500",
        input_background_fill="white",
        input_background_fill_dark="#232326",
        input_border_color="#d4d7da",
        input_border_color_dark="#3f3f46",
        input_border_color_focus="*primary_600",
        input_border_color_focus_dark="*primary_400",
        input_border_width="1px",
        input_shadow="none",
        input_shadow_focus="none",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        button_secondary_background_fill="transparent",
        button_secondary_background_fill_dark="transparent",
        button_secondary_background_fill_hover="*background_fill_secondary",
        button_secondary_background_fill_hover_dark="*background_fill_secondary",
        button_secondary_text_color="*body_text_color_subdued",
        button_secondary_text_color_dark="*body_text_color_subdued",
        button_secondary_border_color="transparent",
        button_secondary_border_color_dark="transparent",
        button_large_text_weight="500",
        button_small_text_weight="400",
        slider_color="*primary_600",
        slider_color_dark="*primary_400",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
    )


def script(language: str, panel: str) -> str:
    """The script of the page, as HTML.

    Args:
        language: "auto" for the browser's choice, or one of `language.LANGUAGES`.
        panel: the one that is open at first on a wide screen; none if empty.
    """
    source = (ASSETS / "page.js").read_text(encoding="utf-8")
    return f"<script>{source.replace('%LANGUAGE%', language).replace('%PANEL%', panel)}</script>"
