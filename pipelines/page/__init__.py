"""The page of `hqvae app`, by Gradio; what it does to pictures and codes is `playground.py`'s."""

import gradio as gr

from pipelines.page.code_tabs import codebook_tab, codes_tab
from pipelines.page.sampling_tabs import redraw_tab, samples_tab
from pipelines.playground import Playground

__all__ = ["STYLE", "THEME", "build_page"]

THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
STYLE = """
.gradio-container img {image-rendering: pixelated}
#picture img {width: 100%; height: 100%; object-fit: contain}
.grid-wrap {height: auto !important; min-height: 0 !important; max-height: none !important}
#offered .grid-container, #codebook .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(100px, 1fr)) !important;
}
#offered .caption-label, #codebook .caption-label {padding: 0 4px}
"""
NO_PRIOR = (
    "*Drawing new pictures and redrawing parts need a prior, and this run has none: "
    "`hqvae train-prior` trains it (stage two).*"
)


def build_page(playground: Playground, title: str) -> gr.Blocks:
    """All tabs that the models allow."""
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# {title}")
        if playground.generation is None:
            gr.Markdown(NO_PRIOR)
        else:
            with gr.Tab("New pictures"):
                samples_tab(playground)
        with gr.Tab("A picture and its codes"):
            codes_tab(playground)
        if playground.generation is not None:
            with gr.Tab("Redraw a part"):
                redraw_tab(playground)
        with gr.Tab("What the codes draw"):
            codebook_tab(playground)
        with gr.Accordion("About the models", open=False):
            gr.Code(repr(playground.pipeline), language=None, show_label=False)
    return page
