"""CLIP text models and T5 encoders, tiny and random, from local folders."""

import json
import logging
import string
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines import ImageGenerationPipeline
from pipelines.condition_config import ConditionSourceConfig
from pipelines.config import DataConfig
from pipelines.text_encoders import HuggingFaceEncoder, encode_texts, tokens_of
from pipelines.train_prior import train_prior
from pipelines.train_tokenizer import train_tokenizer
from tests.image_files import noise, save
from tests.text_encoders import LetterEncoder
from tests.tiny_runs import prior_run, tokenizer_run
from tokenizer.storage.errors import InputError

transformers = pytest.importorskip("transformers")
KINDS = pytest.mark.parametrize("kind", ["clip", "t5"])
TEXTS = ["a red dot", "dot", "", "a small red star left above"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind, as `save_pretrained` writes it."""
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    letters = string.ascii_lowercase
    ends = ["<|startoftext|>", "<|endoftext|>"]
    names = [*letters, *(f"{letter}</w>" for letter in letters), *ends]
    clip = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(names),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=20,
            bos_token_id=names.index(ends[0]),
            eos_token_id=names.index(ends[1]),
            pad_token_id=names.index(ends[1]),
        )
    )
    clip.save_pretrained(root / "clip")
    vocabulary = {name: number for number, name in enumerate(names)}
    transformers.CLIPTokenizer(vocabulary, [], model_max_length=20).save_pretrained(root / "clip")
    pieces = ["<pad>", "</s>", "<unk>", "▁", *letters]
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(pieces), d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2
        )
    )
    t5.save_pretrained(root / "t5")
    scored = [(piece, -float(number)) for number, piece in enumerate(pieces)]
    transformers.T5Tokenizer(scored, extra_ids=0).save_pretrained(root / "t5")
    return {kind: root / kind for kind in ("clip", "t5")}


@KINDS
def test_tokens_of_a_text_do_not_depend_on_the_others(kind: str, folders: dict[str, Path]) -> None:
    encoder = HuggingFaceEncoder(str(folders[kind]))
    together = tokens_of(encoder, TEXTS, 40)
    for text, tokens in zip(TEXTS, together, strict=True):
        alone = tokens_of(encoder, [text], 40)[0]
        torch.testing.assert_close(alone, tokens, rtol=1e-2, atol=1e-2)
    # A token per letter, and those that mark start, end and spaces.
    most = encoder._most_tokens
    assert [len(own) for own in together[:2]] == ([9, 5] if kind == "clip" else [11, 5])
    assert len(together[3]) == min(most, 40) if kind == "clip" else len(together[3]) < 40
    padded = encode_texts(encoder, TEXTS[:2], 16)
    assert tuple(padded.embeddings.shape) == (2, 16, 16)
    assert padded.mask.sum(1).tolist() == [len(own) for own in together[:2]]
    assert [len(own) for own in tokens_of(encoder, TEXTS, 4)] == [
        min(4, len(own)) for own in together
    ]


@KINDS
def test_a_prior_on_captions_is_trained_saved_and_asked_by_text(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    rows = []
    for number in range(12):
        save(tmp_path / "images" / f"{number:02}.png", noise(16, 16, seed=number))
        text = f"a {('red', 'green')[number % 2]} dot"
        rows.append(json.dumps({"file_name": f"{number:02}.png", "text": text}))
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(rows))
    data = DataConfig(
        dataset="folder",
        root=tmp_path / "images",
        image_size=16,
        cache_dir=tmp_path / "cache",
        validation_share=0.3,
    )
    run = tokenizer_run(tmp_path / "run", tmp_path / "cache", total_steps=1)
    train_tokenizer(run.model_copy(update={"data": data}))
    condition = ConditionSourceConfig(kind="text", text_encoder=str(folders[kind]))
    config = prior_run(tmp_path / "run", total_steps=1).model_copy(update={"condition": condition})
    train_prior(config)
    train_prior(config)  # goes on
    pipeline = ImageGenerationPipeline.from_pretrained(tmp_path / "run")
    saved = pipeline.prior.config.condition
    assert saved.text_encoder.source == str(folders[kind])
    assert saved.text_encoder.content_hash == HuggingFaceEncoder(str(folders[kind])).content_hash()
    one = pipeline(2, condition="a red dot", progress=False)
    each = pipeline(2, condition=["a red dot", "a green dot"], progress=False)
    assert np.array_equal(one[0], each[0])
    other = "t5" if kind == "clip" else "clip"
    moved = ImageGenerationPipeline.from_pretrained(tmp_path / "run", text_encoder=folders[other])
    with pytest.raises(InputError, match="must be the one that this prior was trained with"):
        moved(1, condition="a red dot", progress=False)


def test_what_is_cut_is_said(caplog: pytest.LogCaptureFixture) -> None:
    encoded = encode_texts(LetterEncoder(), ["abc", "abcd"], 3)
    assert torch.equal(encoded.embeddings[0], encoded.embeddings[1])
    assert caplog.messages == [
        "condition: 'abcd' is cut to 3 tokens, those of the longest caption in training"
    ]


def write_config(folder: Path, text: str) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(text)
    return str(folder)


def test_what_is_no_encoder_is_refused_in_one_line(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for path in folders["t5"].iterdir():
        (pickled / path.name).write_bytes(path.read_bytes())
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    wrong = {
        "": "must be a folder or a name on the hub, got ''",
        "./nowhere": "there is no such folder",
        write_config(tmp_path / "bert", '{"model_type": "bert"}'): "must be one of clip, .*'bert'",
        write_config(tmp_path / "broken", "{"): "cannot be loaded: ",
        str(tmp_path): "cannot be loaded: ",
        str(pickled): "cannot be loaded: ",
    }
    for source, message in wrong.items():
        with pytest.raises(InputError, match=message) as caught:
            HuggingFaceEncoder(source)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[text\]'"):
        HuggingFaceEncoder(str(folders["t5"]))


def test_the_tries_to_reach_the_hub_are_not_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*given: Any, **options: Any) -> None:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise OSError("no connection")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(InputError, match="text_encoder: some/encoder cannot be loaded: no conn"):
        HuggingFaceEncoder("some/encoder")
    assert caplog.messages == []


class Wrong(LetterEncoder):
    """Changes what the encoder gives."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def __call__(self, texts: Any, max_tokens: int) -> Any:
        return self.change(*super().__call__(texts, max_tokens))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"\(1, at most 10, channels\), got \(3, 2\)", lambda tokens, mask: (tokens[0], mask)),
        (r"channels\), got \(2, 3, 2\)", lambda tokens, mask: (tokens.repeat(2, 1, 1), mask)),
        ("boolean mask .* got torch.int64", lambda tokens, mask: (tokens, mask.long())),
        ("with a token in each row", lambda tokens, mask: (tokens, mask & False)),
        ("finite tokens", lambda tokens, mask: (tokens * 1e6, mask)),
    ],
)
def test_an_encoder_that_gives_something_else_is_refused(message: str, change: Any) -> None:
    with pytest.raises(InputError, match=message):
        encode_texts(Wrong(change), ["dot"], 9)
