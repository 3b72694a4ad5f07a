"""Tabs that need a prior: new pictures, and parts that are drawn anew."""

from collections.abc import Callable
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from pipelines.images import enlarged
from pipelines.page.conditions import condition_inputs
from pipelines.page.parts import GALLERY, ONE_AT_A_TIME, new_picture, told
from pipelines.playground import CANVAS_SIDE, Playground
from pipelines.sampling_config import SamplingConfig
from pipelines.tuned_sampling import filled
from tokenizer.storage.errors import InputError

LARGEST_SEED = 2**31 - 1


def samples_tab(playground: Playground) -> None:
    """Pictures of the prior."""
    gr.Markdown("The prior draws codes, layer by layer, and the tokenizer makes pictures of them.")
    inputs = _sampling_inputs(playground, 8, "each in turn")
    button = gr.Button("Draw", variant="primary")
    pictures = gr.Gallery(columns=8, elem_id="samples", **GALLERY)

    @told
    def draw(*values: Any) -> list[Any]:
        return playground.sample(*inputs.read(*values))

    button.click(draw, inputs.components, pictures, **ONE_AT_A_TIME)


def redraw_tab(playground: Playground) -> None:
    """A picture of which a part is painted over, and drawn anew."""
    assert playground.generation is not None
    gr.Markdown(
        "Drop a picture, paint over what is to change, and have it drawn anew. What is not painted "
        "over stays exactly as it is."
    )
    with gr.Row():
        with gr.Column():
            canvas = gr.ImageEditor(
                label="Paint here",
                type="pil",
                format="png",
                sources=["upload", "clipboard"],
                transforms=(),
                layers=False,
                brush=gr.Brush(32, ["rgb(255, 0, 90)"], color_mode="fixed"),
                canvas_size=(CANVAS_SIDE, CANVAS_SIDE),
                elem_id="canvas",
                height=CANVAS_SIDE + 160,
            )
            hint = gr.Markdown(elem_id="hint")
            new = gr.Button("Take a new one from the prior")
        pictures = gr.Gallery(columns=2, elem_id="redrawn", **GALLERY)
    kept = gr.State()  # what the canvas shows, which would give other alpha back
    blank = Image.new("RGBA", (playground.side, playground.side))
    has_null = playground.generation.prior.conditioner.has_null
    inputs = _sampling_inputs(playground, 4, "any (unguided)" if has_null else "")
    button = gr.Button("Redraw", variant="primary")

    @told
    def prepare(drawing: dict[str, Any]) -> tuple[Any, Any, str]:
        """As the networks see it, large enough to paint on."""
        picture = playground.prepared(drawing["background"])
        said = "This is what the networks see of it: paint over it."
        return enlarged(picture, CANVAS_SIDE), picture, said

    @told
    def redraw(drawing: dict[str, Any] | None, picture: Any, *values: Any) -> list[Any]:
        if drawing is None or drawing["background"] is None:
            raise InputError("a picture must be there first: drop one")
        if drawing["background"].size != enlarged(blank, CANVAS_SIDE).size:
            raise InputError(
                "the picture must be ready first: wait until it is shown as the networks see it"
            )
        painted = drawing["layers"][0] if drawing["layers"] else blank
        return playground.redraw(picture, painted, *inputs.read(*values))

    # Hidden: over a canvas whose value is set, "processing" would stay, and keep the brush off.
    canvas.upload(prepare, canvas, [canvas, kept, hint], show_progress="hidden", **ONE_AT_A_TIME)
    button.click(redraw, [canvas, kept, *inputs.components], pictures, **ONE_AT_A_TIME)
    new_picture(playground, new, canvas, CANVAS_SIDE, kept)


# How codes are drawn


class SamplingInputs(NamedTuple):
    """Components, and what `Playground.sample` takes of their values, in this order."""

    components: list[Any]
    read: Callable[..., tuple[int, int | None, int, SamplingConfig, Any]]


def _sampling_inputs(playground: Playground, number: int, no_label: str) -> SamplingInputs:
    """Asks for a class or condition, how many, and settings per layer.

    Args:
        playground: with a prior.
        number: of pictures, at first.
        no_label: what is drawn where no class is chosen; empty if one has to be.
    """
    assert playground.generation is not None
    prior = playground.generation.prior
    first = filled(SamplingConfig(), playground.generation.tuned, is_conditional=True)
    names = prior.config.class_names or [str(i) for i in range(prior.config.num_classes)]
    choices = [(name, i) for i, name in enumerate(names)]
    is_conditional = prior.config.num_classes > 0 or prior.config.condition is not None
    if no_label or not choices:
        choices = [(no_label, -1), *choices]
    with gr.Row():
        label = gr.Dropdown(
            choices, value=choices[0][1], label="Class", visible=prior.config.num_classes > 0
        )
        count = gr.Slider(1, 16, number, step=1, label="How many")
        seed = gr.Number(0, precision=0, minimum=0, maximum=LARGEST_SEED, label="Seed")
        guidance = gr.Slider(
            1,
            10,
            first.guidance_scale,
            step=0.5,
            label="Guidance (1: off)",
            visible=is_conditional and prior.conditioner.has_null,
        )
    condition = condition_inputs(playground)
    with gr.Accordion("Per layer: temperature and top-p", open=False):
        gr.Markdown(
            "Below 1, temperature gives likelier codes; top-p draws from the likeliest codes of "
            "that total probability alone. Layer 1 is the coarsest."
        )
        temperatures, top_ps = [], []
        for layer in range(len(playground.layers)):
            with gr.Row():
                name = playground.describe_layer(layer)
                title = f"Temperature, {name}"
                temperatures.append(gr.Slider(0.1, 2, first.temperature, step=0.05, label=title))
                top_p = first.top_p or 1
                top_ps.append(gr.Slider(0.05, 1, top_p, step=0.05, label=f"Top-p, {name}"))
    per_layer = temperatures + top_ps

    def read(
        number: float, chosen: int, given_seed: float, scale: float, *values: Any
    ) -> tuple[int, int | None, int, SamplingConfig, Any]:
        half, both = len(temperatures), len(per_layer)
        config = SamplingConfig.checked(
            temperature=values[:half], top_p=values[half:both], guidance_scale=scale
        )
        given = condition.read(int(number), *values[both:])
        return int(number), None if chosen < 0 else chosen, int(given_seed or 0), config, given

    return SamplingInputs([count, label, seed, guidance, *per_layer, *condition.components], read)
