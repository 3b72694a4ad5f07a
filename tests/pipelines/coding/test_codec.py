"""Pictures as files: what is written is read, in few bytes, and whatever is damaged is refused."""

import bisect
import functools
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from pipelines import TokenizerPipeline
from pipelines.coding import codec as codec_module
from pipelines.coding.codec import Codec
from tests.image_files import noise
from tests.tokenizer.test_code_prior import tokenizer_of, with_prior
from tests.tokenizer.test_search import SMALL
from tests.tokenizer.tiny import BASELINE, FSQ, HYBRID, NETWORKS, make_tokenizer
from tokenizer import InputError, Tokenizer, hq_vae, rsq_vae, sq_vae_2
from tokenizer.code_prior import drawn

PLAIN = {"hybrid": HYBRID, "nearest": BASELINE, "fsq": FSQ}
KINDS: dict[str, Callable[[], Tokenizer]] = {
    **{name: functools.partial(make_tokenizer, config) for name, config in PLAIN.items()},
    "own prior": lambda: tokenizer_of(with_prior(HYBRID)),
    "nearest with prior": lambda: tokenizer_of(with_prior(BASELINE, 1)),
    "small prior": lambda: tokenizer_of(with_prior(SMALL["HQ-VAE"][0])),
}
SIZES = [(1, 1), (1, 9), (8, 8), (17, 30)]


@functools.cache
def pipeline_of(kind: str) -> TokenizerPipeline:
    return TokenizerPipeline(KINDS[kind]().float())


def padded(pipeline: TokenizerPipeline, picture: torch.Tensor) -> torch.Tensor:
    """Mirrored at the lower and right edge, position by position."""
    multiple = pipeline.tokenizer.config.groups[0].downsampling

    def mirrored(side: int) -> list[int]:
        there = [*range(side), *range(side - 2, 0, -1)]
        return [there[place % len(there)] for place in range(-(-side // multiple) * multiple)]

    return picture[:, :, mirrored(picture.shape[2])][:, :, :, mirrored(picture.shape[3])]


@pytest.mark.parametrize("kind", [*PLAIN, "own prior", "nearest with prior"])
def test_a_picture_of_any_size_comes_back_as_its_codes_draw_it(kind: str) -> None:
    pipeline = pipeline_of(kind)
    for height, width in SIZES:
        pixels = noise(height, width, seed=height)
        images = padded(pipeline, torch.from_numpy(pixels).movedim(-1, 0)[None] / 127.5 - 1)
        codes = pipeline.tokenizer.encode(images)
        content = pipeline.compress(pixels)
        coded = Codec(pipeline.tokenizer).decode(content)
        for one, other in zip(coded.indices, codes, strict=True):
            assert torch.equal(one, other)
        found = pipeline.decompress(content, output="pt")
        assert isinstance(found, torch.Tensor)
        expected = pipeline.decode(codes, output="pt")[:, :, :height, :width]  # type: ignore[index]
        assert torch.equal(found, expected)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_channels_are_those_of_the_tokenizer(channels: int) -> None:
    torch.manual_seed(0)
    config = sq_vae_2((4, 2), 5, 4, networks=NETWORKS).model_copy(update={"channels": channels})
    pipeline = TokenizerPipeline(Tokenizer(config))
    picture = pipeline.decompress(pipeline.compress(noise(5, 6, channels)))[0]
    assert picture.mode == ["L", "LA", "RGB", "RGBA"][channels - 1]
    assert picture.size == (6, 5)


@pytest.mark.parametrize("side", [1, 32, 128])
@pytest.mark.parametrize("num_layers", [2, 4])
def test_a_file_is_hardly_longer_than_the_cross_entropy(num_layers: int, side: int) -> None:
    torch.manual_seed(0)
    config = rsq_vae(4, num_layers, 256, 4, networks=NETWORKS)
    if num_layers == 2:
        config = sq_vae_2((8, 4), 256, 4, networks=NETWORKS)
    tokenizer = Tokenizer(with_prior(config)).eval()
    assert tokenizer.code_prior is not None
    with torch.no_grad():
        for name, parameter in tokenizer.code_prior.named_parameters():
            if ".4." in name:  # far from uniform
                parameter.copy_(3 * torch.randn(parameter.shape))
    sides = -(-side // config.groups[0].downsampling) * config.groups[0].downsampling
    # Codes that are as likely as they are said to be.
    empty = [
        torch.zeros(1, own.depth, own.height, own.width, dtype=torch.int64)
        for own in tokenizer.code_maps(sides, sides)
    ]
    codes = tokenizer.code_prior.completed(tokenizer.top_down, empty, 0, drawn(None))
    num_bytes = tokenizer.code_length(codes).sum().item() / 8
    content = Codec(tokenizer).encode(codes, side, side)
    assert len(content) <= 1.01 * num_bytes + 24
    assert len(Codec(tokenizer).encode(codes, side, side, "counts")) > len(content)


def test_counts_learn_what_comes_often() -> None:
    tokenizer = make_tokenizer(HYBRID)
    codes = [
        torch.zeros(1, own.depth, own.height, own.width, dtype=torch.int64)
        for own in tokenizer.code_maps(128, 128)
    ]
    codec = Codec(tokenizer)
    often = len(codec.encode(codes, 128, 128))
    for group in codes:
        group.random_(6)
    evenly = len(codec.encode(codes, 128, 128))
    num_codes = sum(group.numel() for group in codes)
    assert evenly < 1.02 * num_codes * 2.585 / 8 + 30
    assert often < evenly / 15


@pytest.mark.parametrize("kind", ["hybrid", "small prior"])
def test_a_file_with_one_wrong_bit_gives_an_error_or_the_exact_picture(kind: str) -> None:
    pipeline = pipeline_of(kind)
    codec = Codec(pipeline.tokenizer)
    content = pipeline.compress(noise(9, 17, pipeline.tokenizer.config.channels))
    sound = codec.decode(content)
    num_errors = 0
    for place, bit in itertools.product(range(len(content)), range(8)):
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        try:
            found = codec.decode(bytes(changed))
        except InputError:
            num_errors += 1
            continue
        assert found[1:] == sound[1:]
        assert all(map(torch.equal, found.indices, sound.indices))
    assert num_errors > 7.5 * len(content)


@pytest.mark.parametrize("kind", ["hybrid", "own prior"])
def test_a_file_cut_behind_a_layer_gives_its_layers(kind: str) -> None:
    pipeline = pipeline_of(kind)
    codec = Codec(pipeline.tokenizer)
    codes = [
        torch.randint(6, (1, own.depth, own.height, own.width))
        for own in pipeline.tokenizer.code_maps(32, 40)
    ]
    content = codec.encode(codes, 40, 32)
    header, start = codec.header(content)
    ends = [start + end for end in itertools.accumulate(header.lengths)]
    assert len({*ends}) >= 3
    for end in ends:
        expected = pipeline.decode(codes, bisect.bisect_right(ends, end), output="pt")
        assert torch.equal(pipeline.decompress(content[:end], "pt"), expected)  # type: ignore[arg-type]
    for end in {*range(len(content))} - {*ends}:
        if end < ends[-1] or end % 8 == 0:  # within the last layer all of it is read
            with pytest.raises(InputError, match=r"^content .*(cut|none|damaged)"):
                codec.decode(content[:end])
    with pytest.raises(InputError, match="damaged or cut in part 1 of 5"):
        codec.decode(content[:start] + bytes(ends[0] - start))


def test_the_number_of_threads_does_not_matter_and_stays() -> None:
    pipeline = pipeline_of("own prior")
    picture, before = noise(64, 64), torch.get_num_threads()
    contents = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            contents.append(pipeline.compress(picture))
            assert torch.get_num_threads() == number
            with pytest.raises(InputError):
                pipeline.decompress(contents[-1][:-9] + bytes(9))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)
    assert contents[0] == contents[1]


def test_quality_saves_bits() -> None:
    pipeline = pipeline_of("own prior")
    picture = noise(16, 24)
    lengths = [len(pipeline.compress(picture, quality)) for quality in (None, 0.0, 30.0)]
    assert lengths[0] == lengths[1] > lengths[2]


def test_what_cannot_be_compressed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own, plain = pipeline_of("own prior"), pipeline_of("hybrid")
    picture = noise(8, 8)
    for pipeline, arguments, message in (
        (plain, (picture, 1.0), "quality must be None for a tokenizer without a prior"),
        (own, (picture, -1.0), "quality must be None or from 0 to 1,000,000, got -1.0"),
        (own, (picture, float("nan")), "quality must be None or from 0"),
        (own, (picture, None, "prior"), "model must be 'counts' or 'own' for this tokenizer"),
        (plain, (picture, None, "own"), "model must be 'counts' for this tokenizer"),
        (own, (np.stack([picture, picture]),), "image must be one picture, got 2"),
        (own, ("none.png",), "images: none.png is not a readable image"),
    ):
        with pytest.raises(InputError, match=message):
            pipeline.compress(*arguments)
    content = own.compress(picture)
    monkeypatch.setattr(codec_module, "MAX_PIXELS", 63)
    for call in (lambda: own.compress(picture), lambda: own.decompress(content)):
        with pytest.raises(InputError, match=r"a picture must have 1 to 63 pixels .* 8 by 8"):
            call()


def test_what_is_no_file_of_this_tokenizer_is_refused() -> None:
    own, plain = pipeline_of("own prior"), pipeline_of("hybrid")
    content = own.compress(noise(8, 8))
    other = TokenizerPipeline(Tokenizer(hq_vae((8, 4), (2, 3), 6, 4, networks=NETWORKS)))
    for pipeline in (plain, other):
        for model in ("own", "counts"):
            strange = own.compress(noise(8, 8), model=model)
            if (pipeline, model) == (plain, "counts"):
                continue  # the tokenizer is the same but for its prior
            with pytest.raises(InputError, match=r"damaged in its header, or of another tokenizer"):
                pipeline.decompress(strange)
    for changed, message in (
        (b"", "it is none"),
        (b"\x89PNG and so on", "it is none"),
        (b"HQ", "cut within its header, after 2 bytes"),
        (b"HQ\3" + content[3:], "must be of version 2 or before, got 3: a later version wrote it"),
        (b"HQ\0" + content[3:], "must be of version 2 or before, got 0: it is damaged"),
    ):
        with pytest.raises(InputError, match=message):
            own.decompress(changed)
