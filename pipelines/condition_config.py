"""Where the conditions of a run's images come from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro
from pydantic import Field
from pydantic import model_validator as validates

from tokenizer.storage.configs import StrictConfig

ConditionKind = Literal["class", "none", "vectors", "text", "attributes"]


_USED_BY: Mapping[str, tuple[str, ...]] = {
    "file": ("vectors", "text", "attributes"),
    "columns": ("text", "attributes"),
    "text_encoder": ("text",),
    "max_tokens": ("text",),
}


class ConditionSourceConfig(StrictConfig):
    """What the prior is conditioned on, and where it is found."""

    kind: Annotated[
        ConditionKind | None, tyro.conf.arg(metavar=f"{{{','.join(get_args(ConditionKind))}}}")
    ] = None
    """`class` of the data set; `none`; `vectors` or tokens from a file; `text`: captions;
    `attributes`: several labels. Not given: class or none, by `is_class_conditional`."""
    file: Path | None = None
    """Below data.root, and below data.validation_root: by default conditions.safetensors or
    conditions.npy for vectors, metadata.csv or metadata.jsonl for text and attributes."""
    columns: tuple[str, ...] = ()
    """`text`: the one with the captions; none given: text or caption. `attributes`: those to use;
    none given: all but file_name, text and caption."""
    text_encoder: str = ""
    """`text`: folder, or name on the Hugging Face hub, of a CLIP text model or a T5 encoder."""
    max_tokens: Annotated[int, Field(gt=0, le=1024)] = 77
    """`text`: tokens of a caption; longer ones are cut."""

    @validates(mode="after")
    def _check(self) -> "ConditionSourceConfig":
        for name, kinds in _USED_BY.items():
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default and self.kind not in kinds:
                raise ValueError(
                    f"{name} applies to kind {' or '.join(kinds)} alone, got {self.kind}"
                )
        if self.kind == "text" and len(self.columns) > 1:
            raise ValueError(f"columns must name one for kind text, got {len(self.columns)}")
        return self
