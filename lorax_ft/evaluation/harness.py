"""A model for lm-evaluation-harness, so that its tasks measure a model or an adapter of ours.

    python -m lorax_ft.evaluation.harness --model lorax_ft \\
        --model_args path=MODEL,adapter=FOLDER --tasks arc_easy

The command is lm_eval's own, which finds this model only after this module was imported.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from lorax_ft.config import QuantConfig
from lorax_ft.evaluation.likelihood import TokenScores, token_scores
from lorax_ft.evaluation.next_token import BATCH_TOKENS, next_tokens
from lorax_ft.inference.generate import text_positions
from lorax_ft.inference.sampling import Sampling
from lorax_ft.inference.texts import stream_texts
from lorax_ft.interop.encoding import run_tokenizer
from lorax_ft.interop.load import load_model
from lorax_ft.interop.new_tokens import with_tokens_of
from lorax_ft.interop.peft import load_peft
from lorax_ft.models.model import LoadedModel
from lorax_ft.template_limits import template_limits
from lorax_ft.tree import Tree

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    package = str(error.name).partition(".")[0]
    MISSING = f'{package} is not installed; run pip install "lorax_ft[lm-eval]"'
    if __name__ == "__main__":
        print(f"error: {MISSING}", file=sys.stderr)
        sys.exit(2)
    raise ModuleNotFoundError(MISSING, name=error.name) from error

MAX_GEN_TOKS = 256
"""New tokens of an answer where a task does not say how many."""

Request = tuple[tuple[str, str], list[int], list[int]]
"""The texts of a context and its continuation, and the token ids of both."""


@register_model("lorax_ft")
class LoraxLM(TemplateLM):
    """A model of lorax_ft, with or without an adapter."""

    def __init__(
        self,
        path: str,
        adapter: str | None = None,
        revision: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        quant: Literal["none", "nf4", "int8"] = "none",
        batch_tokens: int = BATCH_TOKENS,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """Loads the model.

        Args:
          path: Hugging Face folder, .gguf file or hub id.
          adapter: PEFT folder.
          revision: branch, tag or commit of a hub id.
          dtype: of the weights and the activations.
          quant: format to quantize the kernels to.
          batch_tokens: tokens of a batch of texts that are scored.
          batch_size: answers that are generated at once; auto is 8.
          max_batch_size: not used; lm_eval passes it.
          device: not used, as JAX chooses; lm_eval passes it.
        """
        super().__init__()
        model = load_model(path, revision=revision, dtype=dtype, quant=QuantConfig(format=quant))
        params = model.params
        if adapter is not None:
            model = with_tokens_of(adapter, model)
            params = load_peft(adapter, model)
        self._set(model, params, batch_tokens=int(batch_tokens), batch_size=batch_size)

    @classmethod
    def of(cls, model: LoadedModel, params: Tree, *, batch_size: int = 8) -> LoraxLM:
        """The model of parameters that are already in memory."""
        # Without `__init__`, which loads a model.
        made = cls.__new__(cls)
        TemplateLM.__init__(made)
        made._set(model, params, batch_tokens=BATCH_TOKENS, batch_size=batch_size)
        return made

    def _set(
        self, model: LoadedModel, params: Tree, *, batch_tokens: int, batch_size: int | str
    ) -> None:
        if model.tokenizer is None:
            raise ValueError(f"{model.source} has no tokenizer")
        self._model = model
        self._params = params
        self._batch_tokens = batch_tokens
        # lm_eval also takes auto:N, to find a size N times.
        is_auto = str(batch_size).startswith("auto")
        self._batch_size = 8 if is_auto else int(batch_size)
        self.tokenizer = model.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        token_id: int = self.tokenizer.eos_token_id
        return token_id

    @property
    def prefix_token_id(self) -> int:
        """The id before a text without context: that of its beginning, or else of its end."""
        token_id: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if token_id is None else token_id

    @property
    def max_length(self) -> int:
        """The positions that a text may take."""
        return text_positions(self._params, self._model.config)

    @property
    def tokenizer_name(self) -> str:
        """The name by which lm_eval keeps requests of different tokenizers apart."""
        return self._model.source.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids, by default with those that the tokenizer starts a text with.

        A text that a chat template wrote already starts with one.
        """
        options: dict[str, Any] = {}
        bos = self.tokenizer.bos_token
        if add_special_tokens is not None:
            options["add_special_tokens"] = add_special_tokens
        elif bos and string.startswith(bos):
            options["add_special_tokens"] = False
        ids: list[int] = run_tokenizer(self.tokenizer, string, **options)["input_ids"]
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The messages in the model's chat template."""
        with template_limits(str(self.tokenizer.get_chat_template())):
            text: str = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        return text

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the most likely one."""
        # The questions of a task start with the same shots, which are computed once.
        self._tasks = [request.task_name for request in requests]
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        texts = []
        # Continuations of one token, such as a letter, need the head at one place only.
        single, others = [], []
        for i, (_, context, target) in enumerate(requests):
            texts.append(self._fitting(context, target))
            if len(target) == 1:
                single.append(i)
            else:
                others.append(i)
        # An empty continuation is certain.
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood") as bar:
            rows = [texts[i] for i in others]
            scores = token_scores(
                self._model,
                self._params,
                rows,
                batch_tokens=self._batch_tokens,
                advance=bar.update,
            )
            for i, score in zip(others, scores, strict=True):
                count = len(requests[i][2])
                if count:
                    results[i] = _of_last(score, count)
            tasks = [self._tasks[i] for i in single]
            found = self._single([texts[i] for i in single], tasks, bar)
            for i, result in zip(single, found, strict=True):
                results[i] = result
        # lm_eval's cache, from which an interrupted evaluation goes on.
        for (pair, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    def _single(
        self, texts: Sequence[np.ndarray], tasks: Sequence[Any], bar: Any
    ) -> list[tuple[float, bool]]:
        """The scores of the last tokens of texts. Choices of one question share its prompt."""
        asked: dict[tuple[Any, bytes], list[int]] = {}
        for i, (text, task) in enumerate(zip(texts, tasks, strict=True)):
            prompt = text[:-1].tobytes()
            asked.setdefault((task, prompt), []).append(i)
        if not asked:
            return []
        rows = list(asked.values())
        # Questions may have fewer choices than others; the rest of their row is not read.
        most = max(map(len, rows))
        targets = np.zeros((len(rows), most), np.int32)
        for row, members in enumerate(rows):
            targets[row, : len(members)] = [texts[i][-1] for i in members]
        found = next_tokens(
            self._model,
            self._params,
            [texts[members[0]][:-1] for members in rows],
            targets,
            groups=[task for task, _ in asked],
            batch_tokens=self._batch_tokens,
            # The bar counts choices, and not questions.
            advance=lambda count: bar.update(count * len(texts) / len(rows)),
        )
        results: list[tuple[float, bool]] = [(0.0, True)] * len(texts)
        for row, members in enumerate(rows):
            for place, i in enumerate(members):
                greedy = found.best[row] == texts[i][-1]
                results[i] = (float(found.log_probs[row, place]), bool(greedy))
        return results

    def _fitting(self, context: Sequence[int], target: Sequence[int]) -> np.ndarray:
        """The tokens of a context and its continuation, without those before the positions."""
        # The last token is not an input.
        longest = self.max_length + 1
        return np.array([*context, *target], np.int32)[-longest:]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each text, which is cut into windows if it is longer than the model's
        positions."""
        windows = []
        owners = []
        for number, request in enumerate(requests):
            (text,) = request.args
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, target in map(make_disjoint_window, pairs):
                windows.append((self._fitting(context, target), len(target)))
                owners.append(number)
        with tqdm(total=len(windows), disable=disable_tqdm, desc="loglikelihood_rolling") as bar:
            scores = token_scores(
                self._model,
                self._params,
                [tokens for tokens, _ in windows],
                batch_tokens=self._batch_tokens,
                advance=bar.update,
            )
        # Of a window only the target counts: what it repeats of the one before is its context.
        totals = np.zeros(len(requests))
        for owner, (_, count), score in zip(owners, windows, scores, strict=True):
            totals[owner] += score.log_probs[-count:].sum(dtype=np.float64)
        results = totals.tolist()
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to a stop string."""
        # Requests of several tasks may come together, each with its task's options.
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until") as bar:
            for members in groups.values():
                self._generate(requests, members, texts, bar)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _generate(
        self, requests: Sequence[Instance], members: Sequence[int], texts: list[str], bar: Any
    ) -> None:
        """Generates the texts of requests with the same options, and puts them into `texts`."""
        options = dict(requests[members[0]].args[1])
        until = options.pop("until", None) or []
        # A generation also ends at the model's own end tokens.
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        count = int(options.pop("max_gen_toks", MAX_GEN_TOKS))
        room = self.max_length - count
        if room < 1:
            raise ValueError(
                f"max_gen_toks is {count}, but the model has {self.max_length} positions"
            )
        sampling = _sampling(options)
        prompts = {}
        for i in members:
            # Of a long context the end, where the question stands, is kept.
            prompts[i] = self.tok_encode(requests[i].args[0])[-room:]
        order = sorted(members, key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            *_, found = stream_texts(
                self._model,
                self._params,
                [prompts[i] for i in rows],
                max_new_tokens=count,
                chunk=16,
                sampling=sampling,
                stop_strings=stops,
                key=_key(start),
            )
            for i, text in zip(rows, found, strict=True):
                texts[i] = text
            bar.update(len(rows))


def _of_last(score: TokenScores, count: int) -> tuple[float, bool]:
    """The log-probability of a text's last tokens, and whether all are the most likely ones."""
    # Summed in float64, for choices of many tokens may differ by little.
    total = score.log_probs[-count:].sum(dtype=np.float64)
    return float(total), bool(score.greedy[-count:].all())


def _sampling(options: Mapping[str, Any]) -> Sampling:
    """How a task's options choose the next token; greedy unless it samples."""
    temperature = float(options.get("temperature") or 0)
    # Tasks say do_sample: false, or temperature: 0, or both.
    do_sample = options.get("do_sample", temperature > 0)
    if not do_sample:
        return Sampling()
    return Sampling(
        temperature=temperature or 1.0,
        top_k=options.get("top_k"),
        top_p=options.get("top_p"),
    )


@functools.cache
def _key(number: int) -> Any:
    import jax

    return jax.random.fold_in(jax.random.key(0), number)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
