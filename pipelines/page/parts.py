"""What the tabs share."""

import functools
from collections.abc import Callable
from typing import Any

import gradio as gr

from pipelines.images import enlarged
from pipelines.playground import Playground
from pipelines.sampling_config import SamplingConfig
from tokenizer.storage.errors import InputError

PNG: dict[str, Any] = {"format": "png", "interactive": False, "buttons": ["download"]}
GALLERY: dict[str, Any] = {**PNG, "object_fit": "contain", "show_label": False}
ONE_AT_A_TIME = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """What is wrong with a visitor's input is shown on the page."""

    @functools.wraps(function)
    def answer(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return answer


def new_picture(
    playground: Playground,
    button: gr.Button,
    target: Any,
    side: int = 0,
    kept: gr.State | None = None,
) -> None:
    """Makes a button put a new picture of the prior into `target`, and into `kept` as it is."""
    counter = gr.State(0)
    kept = gr.State() if kept is None else kept

    @told
    def draw(seed: int) -> tuple[Any, Any, int]:
        (picture,) = playground.sample(1, None, seed, SamplingConfig())
        return enlarged(picture, side or playground.side), picture, seed + 1

    outputs = [target, kept, counter]
    button.click(draw, counter, outputs, show_progress="hidden", **ONE_AT_A_TIME)
