"""The inputs of a run: model, adapter and data, loaded and checked against the config."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lorax_ft import sharding
from lorax_ft.config import AdapterConfig, Config, DataConfig, EvalConfig
from lorax_ft.data.dataset import BLOCK, Dataset, Split, check_sources, load_data
from lorax_ft.evaluation.benchmark import Benchmark, read_benchmark
from lorax_ft.evaluation.multiple_choice import Encoded, encode_benchmark
from lorax_ft.interop.load import load_model
from lorax_ft.interop.peft import load_peft
from lorax_ft.interop.peft_checks import read_config
from lorax_ft.interop.peft_methods import method_name
from lorax_ft.interop.peft_prompts import holds_soft_prompt
from lorax_ft.interop.peft_tokens import trains_tokens_alone
from lorax_ft.lowrank.groups import fully_trained
from lorax_ft.models import splash
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.grouped import check_expert_axis
from lorax_ft.models.model import HEAD, LoadedModel, Model
from lorax_ft.program import command
from lorax_ft.run.additions import check_additions, with_new_tokens
from lorax_ft.schema import METHODS, init_schema
from lorax_ft.sharding import DECODER_RULES
from lorax_ft.soft_prompts.door import virtual_ids, virtual_tokens
from lorax_ft.training.losses import check_router_loss
from lorax_ft.tree import flatten


def check_inputs(config: Config) -> None:
    """Raise for mistakes that would cost the user the time to load the model."""
    _check_quantization(config)
    # Reads one row of each source.
    check_sources(config.data)
    _read_questions(config.eval)


def load_base(config: Config, mesh: Mesh) -> LoadedModel:
    """The model on its devices, with its new tokens and the adapter that the run continues.

    What else a run adds is of its seed (`with_additions`): the runs of a sweep share this.

    Raises:
      ValueError: as `load_model`, `load_peft` and `with_new_tokens`, or the model does not fit the
        rows or the mesh.
    """

    def shard(path: str, leaf: Any) -> Any:
        return sharding.base_sharding(path, leaf, DECODER_RULES, mesh=mesh)

    def check(decoder: DecoderConfig) -> None:
        _check_length(config.data, decoder.max_positions)
        _check_attention(config, decoder)
        check_expert_axis(decoder, config.mesh.expert, source=config.model.path)
        check_router_loss(decoder, config.train.router_aux_loss_coef, source=config.model.path)

    model = load_model(
        config.model.path,
        revision=config.model.revision,
        chat_template=config.model.chat_template,
        dtype=config.model.dtype,
        attention=config.model.attention,
        expert_products=config.model.expert_products,
        # auto is chosen when the size of a batch is known.
        remat="full" if config.model.remat == "auto" else config.model.remat,
        quant=config.quant,
        shardings=shard,
        check=check,
    )
    _check_prequantized(model, config)
    if model.tokenizer is None:
        raise ValueError(
            f"{config.model.path} holds no tokenizer; put its tokenizer.json beside the weights"
        )
    with jax.set_mesh(mesh):
        model = with_new_tokens(model, config)
    if config.adapter.continue_from is not None:
        model = _load_adapter(model, Path(config.adapter.continue_from), config)
    return model


def load_questions(config: EvalConfig, model: Model) -> Encoded | None:
    """The multiple-choice questions that a run measures its accuracy on, if it does.

    Raises:
      ValueError: as `read_benchmark` and `encode_benchmark`.
    """
    benchmark = _read_questions(config)
    if benchmark is None:
        return None
    # A base model, which has no chat template, continues plain text.
    chat = getattr(model.tokenizer, "chat_template", None) is not None
    return encode_benchmark(benchmark, model, shots=config.shots, chat=chat)


def _read_questions(config: EvalConfig) -> Benchmark | None:
    if config.choices is None:
        return None
    return read_benchmark(config.choices, shots=config.shots, limit=config.choices_limit)


def load_dataset(config: Config, model: LoadedModel) -> Dataset:
    """The data of the run, checked against the model's vocabulary and positions.

    The virtual tokens of a soft prompt in the model's parameters stand before each sample.

    Raises:
      ValueError: as `load_data`, or a row does not fit the model, or there are no validation rows
        although the run chooses the best checkpoint by them, or an activated LoRA acts in no row.
    """
    virtual = virtual_tokens(model.params)
    positions = model.config.max_positions
    data = load_data(
        config.data,
        model.tokenizer,
        seed=config.train.seed,
        positions=positions,
        prompt=virtual_ids(virtual, vocab_size=model.config.vocab_size),
        # Each device along the axis has whole blocks.
        blocks=BLOCK * config.mesh.context,
    )
    config.mesh.check_length(data.max_length)
    _check_samples(data.train, model, "training rows", virtual=virtual)
    for name, split in data.validation_sets.items():
        _check_samples(split, model, f"validation rows {name}".rstrip(), virtual=virtual)
    check_additions(config, model, data.train)
    for option in ("load_best", "patience"):
        value = getattr(config.train, option)
        if value and not data.validation.rows:
            raise ValueError(
                f"train.{option} is {value}, but there are no validation rows to compare "
                "checkpoints by; give data.validation or data.validation_rows"
            )
    return data


def _check_length(data: DataConfig, positions: int) -> None:
    """Raise if a row is longer than the model's positions."""
    # The positions of a packed row start anew in each sample, so `_check_samples` checks those.
    if data.max_length == "auto" or data.pack or data.max_length <= positions:
        return
    raise ValueError(
        f"data.max_length is {data.max_length}, but the model has {positions} positions; "
        f"give {positions} or less, or auto"
    )


def _check_samples(split: Split, model: Model, rows: str, *, virtual: int) -> None:
    """Raise if a sample has a token or a position that the model does not have."""
    positions, vocabulary = model.config.max_positions, model.config.vocab_size
    # One row at a time: all samples may be more than memory holds.
    longest = largest = 0
    for row in split.rows:
        for sample in row:
            longest = max(longest, len(sample))
            largest = max(largest, int(sample.tokens[virtual:].max()))
    if longest > positions:
        raise ValueError(
            f"a sample of the {rows} has {longest} tokens, but the model has {positions} "
            f"positions; give data.max_length {positions}, or leave the sample out"
        )
    # JAX does not raise at an index out of bounds, so training would go wrong in silence.
    if largest >= vocabulary:
        raise ValueError(
            f"the tokenizer produced token {largest} in the {rows}, but the model's vocabulary "
            f"has {vocabulary} tokens: the tokenizer does not belong to this checkpoint"
        )


def _load_adapter(model: LoadedModel, folder: Path, config: Config) -> LoadedModel:
    """The model with the adapter of `adapter.continue_from`."""
    params = load_peft(folder, model)
    peft_config = read_config(folder)
    if not holds_soft_prompt(peft_config) and not trains_tokens_alone(peft_config):
        _check_method(method_name(peft_config, folder), folder, config)
    for module in peft_config.get("modules_to_save") or ():
        # PEFT saves a copy of a tied head; here the head and the embeddings are one leaf.
        if module == HEAD and module not in params:
            continue
        path = module.removeprefix("model.").replace(".", "/")
        if not fully_trained(path, config.adapter.train_whole):
            raise ValueError(
                f"{folder} holds a fully trained {path}; give --adapter.train_whole {path} to "
                "continue training it"
            )
    before = flatten(model.params)
    for path, leaf in flatten(params).items():
        module = path.removesuffix("/bias")
        is_trained = path != module and leaf is not before[path]
        if is_trained and not fully_trained(module, config.adapter.train_whole):
            raise ValueError(
                f"{folder} holds trained biases (bias {peft_config.get('bias')!r}), which do not "
                f"train here; export it merged ({command('export')} --target hf) and train on that"
            )
    return dataclasses.replace(model, params=params)


def _check_method(method: str, folder: Path, config: Config) -> None:
    """Raise if options are for another method than that of the adapter to continue from."""
    adapter = config.adapter
    if adapter.method not in (method, AdapterConfig.method):
        raise ValueError(
            f"adapter.method is {adapter.method}, but {folder} holds an adapter of the method "
            f"{method}; remove adapter.method"
        )
    # The folder's own rank, alpha, targets and DoRA replace the options. These stay in force.
    for option in ("dropout", "freeze"):
        value = getattr(adapter, option)
        if value != getattr(AdapterConfig, option) and option not in METHODS[method]:
            raise ValueError(
                f"adapter.{option} is {value}, but {folder} holds an adapter of the method "
                f"{method}, which does not use it; remove adapter.{option}"
            )


def _check_attention(config: Config, decoder: DecoderConfig) -> None:
    """Raise if splash attention is named and does not fit the model or its rows."""
    length = config.data.max_length
    if config.model.attention != "splash" or length == "auto":
        return
    sizes = dataclasses.asdict(config.mesh)
    needed = splash.missing(decoder, tokens=length, cached=False, sizes=sizes)
    if needed is not None:
        raise ValueError(f"model.attention is splash, which needs {needed}; use auto")


def _check_quantization(config: Config) -> None:
    """Raise if the init changes the base, and the changed base cannot be saved."""
    adapter = config.adapter
    # The base does not change under an existing adapter, nor with keep_base.
    keeps_base = adapter.continue_from is not None or adapter.keep_base
    changes_base = init_schema(adapter.init).changes_base and not keeps_base
    if not changes_base or config.quant.format != "int8":
        return
    way_out = "use quant.format nf4"
    if adapter.init != "loftq":  # LoftQ always changes the base.
        way_out += ", or adapter.keep_base"
    raise ValueError(
        f"adapter.init {adapter.init} changes the base, and a changed int8 base cannot be saved; "
        f"{way_out}"
    )


def _check_prequantized(model: LoadedModel, config: Config) -> None:
    """Raise if the init needs the quantization error of a model that was loaded quantized."""
    adapter = config.adapter
    fits_error = adapter.init == "loftq" or config.quant.rounds > 1
    if model.prequantized and fits_error and adapter.continue_from is None:
        raise ValueError(
            f"{model.source} is already in NF4, so its quantization error is unknown; load the "
            "checkpoint that it was quantized from, or use another adapter.init with "
            "quant.rounds 1"
        )
