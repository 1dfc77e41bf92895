"""Benchmark training on real data, packed here and padded in TRL, sample by sample.

    python scripts/bench_data.py --model SMOLLM2 --data gsm8k/train.jsonl --peer PEER/bin/python

All train the same adapter on the same data set with as many tokens a step: here 4 packed rows of
512; in TRL 4 rows padded to 512, or 8 rows padded to the longest of them. Every variant is a
process; they take turns step by step. With `--save FOLDER` the adapters are kept, so that
`scripts/evaluate.py` can compare their losses.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS, LENGTH, RATE = 4, 512, 5e-4
VARIANTS = ("packed", "trl_padded", "trl_longest")


def main() -> None:
    """Compare the variants, or be one of them (--variant)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--data", required=True, help="JSON lines with question and answer")
    parser.add_argument("--peer", default=sys.executable, help="Python with torch, peft and trl")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--save", help="folder for the adapters")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant is None:
        _compare(args)
    elif args.variant == "packed":
        _train_packed(args)
    else:
        _train_trl(args, longest=args.variant == "trl_longest")


def _compare(args: argparse.Namespace) -> None:
    """One process for each variant; a different one goes first in each round."""
    processes = {}
    for name in VARIANTS:
        python = sys.executable if name == "packed" else args.peer
        command = [python, __file__, "--variant", name]
        for option in ("model", "data", "steps"):
            command += [f"--{option}", str(getattr(args, option))]
        if args.save is not None:
            command += ["--save", str(Path(args.save) / name)]
        processes[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    samples: dict[str, list[int]] = {name: [] for name in VARIANTS}
    for step in range(args.steps):
        shift = step % len(VARIANTS)
        for name in VARIANTS[shift:] + VARIANTS[:shift]:
            reply = _call(processes[name])
            seconds[name].append(reply["seconds"])
            samples[name].append(reply["samples"])
        last = {name: f"{seconds[name][-1]:.2f} s" for name in VARIANTS}
        print(f"step {step + 1}", last, file=sys.stderr, flush=True)
    for process in processes.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    print("| variant | samples a step | seconds a step | samples a second | ratio |")
    print("| --- | ---: | ---: | ---: | ---: |")
    rates = {}
    for name in VARIANTS:
        # The first steps warm up: a program is compiled, memory is mapped.
        step_seconds = statistics.median(seconds[name][2:])
        step_samples = statistics.mean(samples[name][2:])
        rates[name] = step_samples / step_seconds
        ratio = rates["packed"] / rates[name]
        numbers = (step_samples, step_seconds, rates[name], ratio)
        cells = [name, *(f"{number:.2f}" for number in numbers)]
        print(f"| {' | '.join(cells)} |")


def _call(process: subprocess.Popen[str]) -> dict[str, Any]:
    """One step of a process."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("step\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith('{"seconds"'):
            return dict(json.loads(line))
    raise RuntimeError("a variant ended; its error is above")


def _reply(began: float, samples: int) -> None:
    print(json.dumps({"seconds": time.perf_counter() - began, "samples": samples}), flush=True)


def _train_packed(args: argparse.Namespace) -> None:
    """Steps of this library, with the batches that a run makes."""
    import jax

    import lorax_ft as lft
    from lorax_ft.run.program import step_key
    from lorax_ft.run.setup import set_up
    from lorax_ft.tree import combine

    config = lft.Config(
        model=lft.ModelConfig(path=args.model),
        adapter=lft.AdapterConfig(rank=8, alpha=16),
        data=lft.DataConfig(train=(args.data,), validation_rows=0, max_length=LENGTH, pack=True),
        optim=lft.OptimConfig(learning_rate=RATE, schedule="constant", warmup_fraction=0.0),
        train=lft.TrainConfig(steps=args.steps, batch_size=ROWS),
    )
    with tempfile.TemporaryDirectory() as folder:
        job = set_up(config, folder=Path(folder))
    print(f"remat: {job.model.config.remat}", file=sys.stderr)
    state, key = job.state, step_key(config)
    for step, _ in enumerate(sys.stdin):
        began = time.perf_counter()
        batch, _ = job.batch(step)
        state, metrics = job.step(state, job.frozen, batch, key)
        jax.block_until_ready(metrics)
        # Segments are numbered from 1 in each row; 0 is padding.
        _reply(began, int(batch["segment_ids"].max(axis=-1).sum()))
    if args.save is not None:
        params = combine(state.trained, job.frozen)
        model = lft.load_model(args.model)
        lft.save_peft(args.save, params, model)


def _train_trl(args: argparse.Namespace, *, longest: bool) -> None:
    """Steps of TRL's trainer with PEFT."""
    import datasets
    import peft
    import torch
    import transformers
    import trl

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    lines = Path(args.data).read_text(encoding="utf-8").splitlines()
    samples = []
    for line in lines:
        fields = json.loads(line)
        samples.append(
            {
                "prompt": [{"role": "user", "content": fields["question"]}],
                "completion": [{"role": "assistant", "content": fields["answer"]}],
            }
        )
    rows = 2 * ROWS if longest else ROWS
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)

    class Turns(transformers.TrainerCallback):
        """A step for each line of stdin."""

        began = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if not sys.stdin.readline():
                raise EOFError
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            _reply(self.began, rows)

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.SFTTrainer(
            model=model,
            processing_class=transformers.AutoTokenizer.from_pretrained(args.model),
            train_dataset=datasets.Dataset.from_list(samples),
            peft_config=peft.LoraConfig(
                r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            args=trl.SFTConfig(
                output_dir=folder,
                max_steps=args.steps,
                per_device_train_batch_size=rows,
                max_length=LENGTH,
                pad_to_multiple_of=None if longest else LENGTH,
                completion_only_loss=True,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to=[],
                logging_strategy="no",
                save_strategy="no",
                disable_tqdm=True,
            ),
            callbacks=[Turns()],
        )
        trainer.train()
        if args.save is not None:
            trainer.save_model(args.save)


if __name__ == "__main__":
    main()
