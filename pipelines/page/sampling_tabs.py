"""Tabs that need a prior: new pictures, and parts that are drawn anew."""

from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from pipelines.images import enlarged
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
        return playground.sample(*_sampling(*values))

    button.click(draw, _listed(inputs), pictures, **ONE_AT_A_TIME)


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
    blank = Image.new("RGBA", (playground.side, playground.side))
    has_null = playground.generation.prior.conditioner.has_null
    inputs = _sampling_inputs(playground, 4, "any (unguided)" if has_null else "")
    button = gr.Button("Redraw", variant="primary")

    @told
    def prepare(drawing: dict[str, Any]) -> tuple[Any, str]:
        """As the networks see it, large enough to paint on."""
        picture = playground.prepared(drawing["background"])
        return enlarged(picture, CANVAS_SIDE), "This is what the networks see of it: paint over it."

    @told
    def redraw(drawing: dict[str, Any] | None, *values: Any) -> list[Any]:
        if drawing is None or drawing["background"] is None:
            raise InputError("a picture must be there first: drop one")
        if drawing["background"].size != enlarged(blank, CANVAS_SIDE).size:
            raise InputError(
                "the picture must be ready first: wait until it is shown as the networks see it"
            )
        painted = drawing["layers"][0] if drawing["layers"] else blank
        return playground.redraw(drawing["background"], painted, *_sampling(*values))

    # Hidden: over a canvas whose value is set, "processing" would stay, and keep the brush off.
    canvas.upload(prepare, canvas, [canvas, hint], show_progress="hidden", **ONE_AT_A_TIME)
    button.click(redraw, [canvas, *_listed(inputs)], pictures, **ONE_AT_A_TIME)
    new_picture(playground, new, canvas, CANVAS_SIDE)


# How codes are drawn


class SamplingInputs(NamedTuple):
    """Components, in the order in which `_sampling` takes their values."""

    number: gr.Slider
    label: gr.Dropdown
    seed: gr.Number
    guidance: gr.Slider
    per_layer: list[gr.Slider]


def _sampling_inputs(playground: Playground, number: int, no_label: str) -> SamplingInputs:
    """Asks for a class, how many, and settings per layer.

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
            visible=prior.config.num_classes > 0 and prior.conditioner.has_null,
        )
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
    return SamplingInputs(count, label, seed, guidance, temperatures + top_ps)


def _listed(inputs: SamplingInputs) -> list[Any]:
    return [*inputs[:-1], *inputs.per_layer]


def _sampling(
    number: float, label: int, seed: float, guidance: float, *per_layer: float
) -> tuple[int, int | None, int, SamplingConfig]:
    """How many, the class, the seed, and how codes are drawn, by the values of the components."""
    half = len(per_layer) // 2
    config = SamplingConfig.checked(
        temperature=per_layer[:half], top_p=per_layer[half:], guidance_scale=guidance
    )
    return int(number), None if label < 0 else label, int(seed or 0), config
