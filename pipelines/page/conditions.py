"""What a prior is conditioned on, as the page asks for it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import gradio as gr

from pipelines.playground import Playground
from prior import AttributeConditionConfig, EmbeddingConditionConfig


class ConditionInputs(NamedTuple):
    """Components, and what the pipeline takes of their values."""

    components: list[Any]
    read: Callable[..., Any]
    """Of the number of images and the values; None where nothing is chosen."""


def condition_inputs(playground: Playground) -> ConditionInputs:
    """Asks for attributes, a text, or a file of vectors; nothing where classes say all."""
    assert playground.generation is not None
    condition = playground.generation.prior.config.condition
    if isinstance(condition, AttributeConditionConfig):
        attributes = condition.attributes
        with gr.Row():
            boxes = [
                gr.Dropdown([*own.values], value=[], multiselect=True, label=f"{own.name} (or any)")
                for own in attributes
            ]

        def chosen(_: int, *values: list[str]) -> Any:
            pairs = zip(attributes, values, strict=True)
            return {own.name: given for own, given in pairs if given} or None

        return ConditionInputs(boxes, chosen)
    if not isinstance(condition, EmbeddingConditionConfig):
        return ConditionInputs([], lambda _: None)
    if condition.text_encoder is not None:
        box = gr.Textbox(label="Text (empty: any, unguided)", max_lines=1, elem_id="text")
        return ConditionInputs([box], lambda _, text: text or None)
    what = f"{condition.dim} channels" + (", tokens" if condition.num_tokens else "")
    with gr.Row():
        file = gr.File(
            label=f"File of vectors of {what} (none: any, unguided)",
            file_types=[".npy", ".safetensors"],
            height=120,
        )
        row = gr.Number(0, precision=0, minimum=0, label="Its row")

    def of_file(count: int, path: str | None, number: int | None) -> Any:
        return path and playground.condition_of_file(path, number or 0, count)

    return ConditionInputs([file, row], of_file)
