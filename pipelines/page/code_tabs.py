"""Tabs about codes: a picture's, which may be changed, and all of a layer."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import gradio as gr

from pipelines.images import difference, enlarged
from pipelines.page.parts import GALLERY, ONE_AT_A_TIME, PNG, new_picture, told
from pipelines.playground import (
    MAP_SIDE,
    MOST_CODES,
    Indices,
    Place,
    Playground,
)
from tokenizer.storage.errors import InputError


class Edited(NamedTuple):
    """Codes of the picture that a visitor works on."""

    original: Indices
    current: Indices


def codes_tab(playground: Playground) -> None:
    """A picture layer by layer, and what becomes of it if its codes are changed."""
    gr.Markdown(
        "Drop a picture: the tokenizer makes codes of it, and a picture of these again, from the "
        f"coarsest layer alone, then with one more each time. It sees {playground.side} by "
        f"{playground.side} pixels: the shorter side resized, the center cropped."
    )
    with gr.Row():
        with gr.Column(scale=1):
            picture = gr.Image(
                label="Your picture",
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard"],
                height=220,
                elem_id="picture",
            )
            new = gr.Button("Take a new one from the prior", visible=bool(playground.generation))
        with gr.Column(scale=3):
            layers = gr.Gallery(columns=5, elem_id="layers", **GALLERY)
    gr.Markdown(
        "### Change its codes\nClick a square of the map, then one of the codes that are offered "
        "below, to put it there. Alike codes have alike colors."
    )
    names = [(playground.describe_layer(i), i) for i in range(len(playground.layers))]
    number = gr.Radio(names, value=0, label="Layer")
    with gr.Row():
        code_map = gr.Image(label="Map of codes", elem_id="map", height=MAP_SIDE + 20, **PNG)
        current = gr.Image(
            label="The picture of these codes", elem_id="current", height=MAP_SIDE + 20, **PNG
        )
        changed = gr.Image(
            label="What has changed (white: most)", elem_id="changed", height=MAP_SIDE + 20, **PNG
        )
    text = gr.Markdown(elem_id="change")
    offered = gr.Gallery(
        columns=12,
        allow_preview=False,
        elem_id="offered",
        **GALLERY,
    )
    with gr.Row():
        code = gr.Number(0, precision=0, minimum=0, label="Or any code by its number")
        put = gr.Button("Put it there")
        reset = gr.Button("Take back all changes")
    shown = [gr.State(), gr.State(), code_map, current, changed, text, offered]
    given = _Given(picture, number, code_map, offered, code, put, reset)
    _answer_clicks(playground, given, layers, shown)
    new_picture(playground, new, picture)


class _Given(NamedTuple):
    """What a visitor gives of a picture and its codes."""

    picture: gr.Image
    number: gr.Radio
    code_map: gr.Image
    offered: gr.Gallery
    code: gr.Number
    put: gr.Button
    reset: gr.Button


def _answer_clicks(
    playground: Playground, given: _Given, layers: gr.Gallery, shown: Sequence[Any]
) -> None:
    """Connects what is given with `shown`, in the order of what `_view` gives."""
    view = functools.partial(_view, playground)
    edited, place, number = shown[0], shown[1], given.number

    @told
    def encode(source: str | None, layer: int) -> tuple[Any, ...]:
        if source is None:
            return [], *view(None, layer, None)
        indices = playground.encode(source)
        pictures = playground.layer_by_layer(source, indices)
        return pictures, *view(Edited(indices, indices), layer, None)

    @told
    def choose(codes: Edited | None, layer: int, event: gr.SelectData) -> tuple[Any, ...]:
        where = playground.place_at(layer, *event.index)
        return view(codes, layer, where)

    @told
    def put_number(
        codes: Edited | None, layer: int, where: Place | None, chosen: int | None
    ) -> tuple[Any, ...]:
        if codes is None or where is None:
            raise InputError("a square of the map must be chosen first: click it")
        replaced = playground.replaced(codes.current, where, chosen)
        return view(codes._replace(current=replaced), layer, where)

    @told
    def put_offered(
        codes: Edited, layer: int, where: Place, event: gr.SelectData
    ) -> tuple[Any, ...]:
        nearest = playground.nearest_codes(codes.current, where)
        return put_number(codes, layer, where, nearest[event.index])  # type: ignore[no-any-return]

    @told
    def take_back(codes: Edited | None, layer: int, where: Place | None) -> tuple[Any, ...]:
        codes = None if codes is None else Edited(codes.original, codes.original)
        return view(codes, layer, where)

    given.picture.change(encode, [given.picture, number], [layers, *shown], **ONE_AT_A_TIME)
    given.code_map.select(choose, [edited, number], shown, **ONE_AT_A_TIME)
    number.change(
        lambda codes, layer: view(codes, layer, None), [edited, number], shown, **ONE_AT_A_TIME
    )
    given.offered.select(put_offered, [edited, number, place], shown, **ONE_AT_A_TIME)
    given.put.click(put_number, [edited, number, place, given.code], shown, **ONE_AT_A_TIME)
    given.reset.click(take_back, [edited, number, place], shown, **ONE_AT_A_TIME)


def _view(
    playground: Playground, codes: Edited | None, layer: int, where: Place | None
) -> tuple[Any, ...]:
    """Codes, place, their map, the picture, what has changed, a text, and the codes on offer."""
    if codes is None:
        return codes, None, None, None, None, "", []
    before, after = (playground.decode(own) for own in codes)
    large = enlarged(after, MAP_SIDE)
    if where is not None:
        playground.frame(large, where)
    between = difference(before, after)
    lines = ["Nothing is changed yet."]
    if between.largest:
        lines = [
            f"Changes so far: {between.share:.0%} of the pixels, by at most {between.largest} "
            "levels of 255."
        ]
    tiles: list[tuple[Any, str]] = []
    if where is not None:
        nearest = playground.nearest_codes(codes.current, where)
        lines.insert(
            0,
            f"**Layer {where.layer + 1}, row {where.row + 1}, column {where.column + 1}: "
            f"code {nearest[0]}.** Below: what each code draws there, nearest codes first.",
        )
        drawn = playground.tiles(codes.current, where, nearest)
        tiles = [(tile, str(own)) for tile, own in zip(drawn, nearest, strict=True)]
        tiles[0] = (tiles[0][0], f"{nearest[0]} (now)")
    code_picture = playground.map_picture(codes.current, layer, where)
    difference_picture = enlarged(between.picture, MAP_SIDE)
    return codes, where, code_picture, large, difference_picture, "  \n".join(lines), tiles


def codebook_tab(playground: Playground) -> None:
    """All codes of a layer."""
    gr.Markdown(
        "Each code of a layer in the middle of a picture that is plain gray elsewhere: what it "
        "draws in its square, and around."
    )
    names = [(playground.describe_layer(i), i) for i in range(len(playground.layers))]
    largest = max(layer.num_codes for layer in playground.layers)
    with gr.Row():
        number = gr.Radio(names, value=0, label="Layer")
        first = gr.Slider(
            0,
            largest - 1,
            0,
            step=MOST_CODES,
            label="From code",
            visible=largest > MOST_CODES,
        )
    show = gr.Button("Show", variant="primary")
    codes = gr.Gallery(columns=12, elem_id="codebook", **GALLERY)

    @told
    def draw(layer: int, start: int) -> Sequence[Any]:
        last_page = (playground.layers[layer].num_codes - 1) // MOST_CODES * MOST_CODES
        return playground.codebook(layer, min(int(start), last_page))

    for event in (show.click, number.change, first.release):
        event(draw, [number, first], codes, **ONE_AT_A_TIME)
