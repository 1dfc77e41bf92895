"""The complete configuration of a run."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from lorax_ft.checks import check, check_types
from lorax_ft.config.adapter import AdapterConfig
from lorax_ft.config.data import DataConfig
from lorax_ft.config.model import MeshConfig, ModelConfig, QuantConfig
from lorax_ft.config.prompt import PromptConfig
from lorax_ft.config.training import EvalConfig, OptimConfig, TrainConfig
from lorax_ft.files import parse_json
from lorax_ft.program import command
from lorax_ft.schema import INITS
from lorax_ft.secrets import redacted

Values = TypeVar("Values")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The complete configuration of a run."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    quant: QuantConfig = dataclasses.field(default_factory=QuantConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    prompt: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        check_types(self)
        self._check_secrets()
        self._check_push()
        self._check_trains()
        if isinstance(self.data.max_length, int):
            self.mesh.check_length(self.data.max_length)
        quant, adapter = self.quant, self.adapter
        if quant.rounds == 1 or adapter.continue_from is not None:
            return
        # Each round quantizes what A B does not explain; keep_base forbids that change of the base.
        alternates = (
            INITS[adapter.init].fits_quantized and quant.format != "none" and not adapter.keep_base
        )
        check(
            alternates,
            f"quant.rounds is {quant.rounds}, which has no effect here; "
            "set quant.format nf4 and adapter.init pissa or loftq, without adapter.keep_base",
        )

    def _check_secrets(self) -> None:
        """Raise for a token or a password in an option, which config.json would show to others."""
        # A command adds options of its own to the sections.
        for section in dataclasses.fields(Config):
            for name, value in vars(getattr(self, section.name)).items():
                texts = value if isinstance(value, tuple) else (value,)
                for text in texts:
                    if isinstance(text, str) and redacted(text) != text:
                        raise ValueError(
                            f"{section.name}.{name} is {redacted(text)!r}, with a password or a "
                            "token, which the run's config.json would show; leave it out and give "
                            "it in the environment, such as HF_TOKEN"
                        )

    def _check_trains(self) -> None:
        """Raise where nothing would train, or the soft prompt leaves no room for a sample."""
        adapter, prompt, length = self.adapter, self.prompt, self.data.max_length
        has_tokens = bool(adapter.trainable_tokens or self.data.new_tokens)
        check(
            bool(adapter.targets or adapter.train_whole) or has_tokens or prompt.kind != "none",
            "adapter.targets and adapter.train_whole are both empty, so nothing would train; "
            "give one of them, adapter.trainable_tokens, or prompt.kind",
        )
        check(
            not has_tokens or adapter.method == "lora" or not adapter.targets,
            "tokens train (data.new_tokens, adapter.trainable_tokens), which PEFT knows beside "
            f"LoRA only, and adapter.method is {adapter.method}; remove one of them",
        )
        check(
            not has_tokens or prompt.kind == "none" or bool(adapter.targets),
            "trainable tokens and a soft prompt train together beside an adapter only; give "
            "adapter.targets too",
        )
        check(
            prompt.kind == "none" or bool(adapter.targets) or not adapter.train_whole,
            "a soft prompt trains alone or beside an adapter, and not beside adapter.train_whole "
            "alone; give adapter.targets too",
        )
        room = 8  # as for data.max_length itself
        check(
            prompt.kind == "none" or length == "auto" or length - prompt.virtual_tokens >= room,
            f"prompt.virtual_tokens is {prompt.virtual_tokens}, which leaves fewer than {room} "
            f"tokens of data.max_length {length} for a sample; raise data.max_length",
        )

    def _check_push(self) -> None:
        adapter = self.adapter
        keeps_base = adapter.continue_from is not None or adapter.keep_base
        changes_base = INITS[adapter.init].changes_base and not keeps_base
        check(
            self.train.push_to_hub is None or not changes_base or self.quant.format == "none",
            f"train.push_to_hub: adapter.init {adapter.init} changes the quantized base, which is "
            "not uploaded, so nobody could use the adapter; use another adapter.init, or upload "
            f"the merged model with {command('merge')} --output hf://owner/name",
        )

    def to_json(self) -> str:
        """The config as JSON, with the value of every field."""
        sections = dataclasses.asdict(self)
        del sections["adapter"]["start_from"]  # deprecated; its value is in continue_from
        return json.dumps(sections, indent=2)

    @staticmethod
    def from_json(text: str) -> Config:
        """The config that `to_json` wrote.

        Raises:
          ValueError: a section or a field is unknown, or a value is invalid.
        """
        content = parse_json(text, "the config")
        check(isinstance(content, dict), "the config is not a JSON object")
        return Config.from_sections(content)

    @staticmethod
    def from_sections(content: Mapping[str, Any], overridden: Collection[str] = ()) -> Config:
        """The config of the sections in a JSON or YAML file, each with the values that are set.

        Args:
          content: the values by section and field.
          overridden: options whose values are still to come. If the values are invalid for one of
            them, they are not checked: the command line, which has them all, is.

        Raises:
          ValueError: a section or a field is unknown, or a value is invalid.
        """
        section_types = {field.name: field.default_factory for field in dataclasses.fields(Config)}
        sections: dict[str, Any] = {}
        for name, values in content.items():
            check(
                name in section_types,
                f"unknown section {name!r} of the config; known: {', '.join(section_types)}",
            )
            check(isinstance(values, dict), f"section {name!r} of the config is not an object")
            section: Any = section_types[name]
            known = [field.name for field in dataclasses.fields(section)]
            for key in values:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {name}.{near[0]}?" if near else ""
                check(key in known, f"{name}.{key} is no option{hint}")
            # JSON and YAML have no tuples.
            sections[name] = (
                section,
                {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()},
            )
        try:
            return Config(**{name: kind(**values) for name, (kind, values) in sections.items()})
        except ValueError as error:
            if not set(re.findall(r"\w+\.\w+", str(error))).intersection(overridden):
                raise
            return unchecked(Config, {name: unchecked(*both) for name, both in sections.items()})


def unchecked(kind: type[Values], values: Mapping[str, Any]) -> Values:
    """A config with these values, as the defaults of a command line that is checked itself."""
    made = object.__new__(kind)
    vars(made).update({**vars(kind()), **values})
    return made
