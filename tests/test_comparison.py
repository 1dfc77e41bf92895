"""Comparisons of methods: intervals, choice of rates, verdicts, and a small run of the script."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from run_cases import ROOT, SHORT, config, script_main

from lorax_ft.comparison import runs as runs_room
from lorax_ft.comparison.cost import Cost
from lorax_ft.comparison.design import Design, points, with_two_sets
from lorax_ft.comparison.document import describe_difference
from lorax_ft.comparison.intervals import Interval, mean_interval, paired_interval
from lorax_ft.comparison.methods import METHODS, chosen_methods, config_of, reference_of
from lorax_ft.comparison.run import compare, prepare
from lorax_ft.comparison.runs import MethodRuns, Run, Runner, best_rate
from lorax_ft.comparison.table import rows_at_best_rates, rows_at_common_rate
from lorax_ft.config import AdapterConfig, Config, DataConfig, TrainConfig, load_config
from lorax_ft.sweep.agree import with_shared_base

DESIGN = Design(rates=(1e-4, 1e-3, 1e-2), common_rate=1e-3, seeds=(0, 1, 2), search_seeds=1)


def run(rate: float, seed: int, choose: float, test: float, other: float = 1.0) -> Run:
    return Run(
        rate=rate,
        seed=seed,
        losses={"choose": choose, "test": test, "other": other},
        first_losses={"choose": 5.0, "test": 5.0, "other": 1.0},
        curve=((1, 2.0), (2, 1.0)),
    )


def method_runs(name: str, runs: list[Run]) -> MethodRuns:
    cost = Cost(parameters=1, seconds_per_step=1.0, memory=None)
    return MethodRuns(
        method=METHODS[name],
        runs=tuple(runs),
        best_rate=best_rate(runs),
        at_edge=False,
        steps=2,
        cost=cost,
    )


def test_the_interval_is_student_t() -> None:
    """t of 2 degrees of freedom is 4.3027 (any table), s of 1, 2, 3 is 1."""
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_a_paired_interval_cancels_what_the_seeds_share() -> None:
    reference = [1.0, 5.0, 9.0]
    difference = paired_interval([0.9, 4.9, 8.9], reference)
    assert difference.mean == pytest.approx(-0.1)
    assert difference.half_width == pytest.approx(0, abs=1e-12)
    assert difference.excludes_zero


def test_one_seed_has_no_interval() -> None:
    difference = mean_interval([-0.5])
    assert math.isinf(difference.half_width)
    assert not difference.excludes_zero
    assert describe_difference(difference) == "−0.5000"
    assert describe_difference(Interval(0.25, 0.5)) == "+0.2500 [−0.2500, +0.7500]"


def test_the_rate_is_chosen_on_one_set_and_judged_on_another() -> None:
    """A rate that is better on the rows to judge by alone is not chosen."""
    runs = []
    for seed in DESIGN.seeds:
        runs += [run(1e-4, seed, 3, 1), run(1e-3, seed, 2, 2 + seed / 100), run(1e-2, seed, 4, 0)]
    lora = method_runs("lora", runs)
    assert lora.best_rate == 1e-3
    (row,) = rows_at_best_rates({"lora": lora}, DESIGN)
    assert row.loss.mean == pytest.approx(2.01)
    assert row.verdict == "reference"
    assert row.others["other"].mean == 0


def test_verdicts() -> None:
    def runs_with(tests: list[float]) -> list[Run]:
        return [run(1e-3, seed, 1, test) for seed, test in enumerate(tests)]

    methods = {
        "lora": method_runs("lora", runs_with([2.0, 2.1, 2.2])),
        "dora": method_runs("dora", runs_with([1.9, 2.001, 2.1])),
        "pissa": method_runs("pissa", runs_with([1.5, 2.5, 2.2])),
        "rslora": method_runs("rslora", runs_with([2.5, 2.6, 2.7])),
        "full": method_runs("full", runs_with([2.0, math.inf, 2.2])),
    }
    verdicts = {row.label: row.verdict for row in rows_at_common_rate(methods, DESIGN)}
    assert verdicts == {
        "LoRA": "reference",
        "DoRA": "lower loss",
        "PiSSA": "noise",
        "rsLoRA": "higher loss",
        "full fine-tuning": "diverged",
    }


def test_a_diverged_seed_disqualifies_a_rate() -> None:
    runs = [run(1e-3, 0, 1, 1), run(1e-3, 1, math.inf, 1), run(1e-4, 0, 3, 3), run(1e-4, 1, 3, 3)]
    assert best_rate(runs) == 1e-4


@pytest.mark.parametrize("name", ["lora", "own", "smollm2_gsm8k", "qwen2_5_7b_ceval"])
def test_every_method_is_a_valid_config(name: str) -> None:
    """Every method over configs with options that some methods do not use; no two are the same."""
    common = load_config(ROOT / f"configs/{name}.py")
    found = {method: config_of(its, common) for method, its in METHODS.items()}
    assert len({each.to_json() for each in found.values()}) == len(METHODS)
    assert found["lora"] == common
    assert found["miss"].adapter.rank == common.adapter.rank
    assert found["ia3"].adapter.rank == AdapterConfig().rank


def test_virtual_tokens_stand_beside_the_tokens_of_a_row() -> None:
    common = load_config(ROOT / "configs/lora.py")
    length = common.data.max_length
    assert isinstance(length, int)
    entries = ["prompt_tuning", "long=p_tuning_v2 prompt.virtual_tokens=50", "lora"]
    entries.append("own=prefix_tuning data.max_length=90")
    found = {name: config_of(its, common) for name, its in chosen_methods(entries).items()}
    lengths = [its.data.max_length for its in found.values()]
    assert lengths == [length + 20, length + 50, length, 90]
    assert found["long"].prompt.kind == "prefix"
    # The config's own virtual tokens are in its length already.
    own = load_config(ROOT / "configs/prompt_tuning.py")
    assert config_of(METHODS["p_tuning"], own).data.max_length == own.data.max_length
    with pytest.raises(ValueError, match=r"LoRA: adapter\.targets of the config is empty"):
        config_of(METHODS["lora"], own)


def test_virtual_tokens_beyond_the_models_positions_are_an_error_before_training(
    tmp_path: Path,
) -> None:
    data = dataclasses.replace(load_config(ROOT / "configs/lora.py").data, max_length=500)
    train = TrainConfig(output=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"prompt tuning: .* 512 positions; give 492 or less"):
        compare(Config(data=data, train=train), DESIGN, methods=["lora", "prompt_tuning"])
    assert not (tmp_path / "run-comparison").exists()


def test_methods_that_continue_other_adapters_do_not_share_a_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_room, "load", lambda config: config.adapter.continue_from)
    runner = Runner(DESIGN, Console(), tmp_path, parallel=2)
    for folder in (None, "out/one", "out/two"):
        assert runner._load(Config(adapter=AdapterConfig(continue_from=folder))) == folder


def test_seeds_that_quantize_the_base_anew_do_not_share_it(tmp_path: Path) -> None:
    """QPiSSA with keep_base would be QLoRA with another start."""
    config = config_of(METHODS["qpissa"], load_config(ROOT / "configs/lora.py"))
    with pytest.raises(ValueError, match="pissa changes the quantized base"):
        with_shared_base(points(config, [1e-3], [0, 1]))
    assert len(with_shared_base(points(config, [1e-3, 1e-2], [0]))) == 2
    trained = []

    class Recorder(Runner):
        def _train_points(self, config: Config, rates: Any, seeds: Any, folder: Path) -> list[Run]:
            trained.append((tuple(seeds), folder.name))
            return []

    Recorder(DESIGN, Console(), tmp_path, parallel=2)._train(config, [1e-3], [1, 2], tmp_path)
    assert trained == [((1,), "seed-1"), ((2,), "seed-2")]


def test_a_comparison_that_is_overwritten_deletes_its_own_files_only(tmp_path: Path) -> None:
    config = Config(train=TrainConfig(output=str(tmp_path / "run")))
    folder = tmp_path / "run-comparison"
    prepare(folder, config, DESIGN, METHODS)
    (folder / "notes.txt").write_text("a person's")
    prepare(folder, config, DESIGN, METHODS)  # nothing was trained yet
    (folder / "dora").mkdir()
    (folder / "dora/results.jsonl").write_text("")
    never = dataclasses.replace(config.train, resume="never")
    with pytest.raises(ValueError, match="already holds a comparison"):
        prepare(folder, dataclasses.replace(config, train=never), DESIGN, METHODS)
    train = dataclasses.replace(config.train, overwrite=True)
    prepare(folder, dataclasses.replace(config, train=train), DESIGN, METHODS)
    assert sorted(file.name for file in folder.iterdir()) == ["design.json", "notes.txt"]
    # Without the file of its design, it may be anything.
    (folder / "design.json").unlink()
    with pytest.raises(ValueError, match="holds no comparison; give another"):
        prepare(folder, dataclasses.replace(config, train=train), DESIGN, METHODS)


def test_a_reference_that_diverged_makes_no_other_diverge() -> None:
    methods = {}
    for name, test in {"lora": math.inf, "dora": 2.0}.items():
        runs = [run(1e-3, seed, 1, test) for seed in DESIGN.seeds]
        methods[name] = method_runs(name, runs)
    rows = rows_at_common_rate(methods, DESIGN)
    assert [row.verdict for row in rows] == ["reference", "the reference diverged"]
    assert describe_difference(rows[1].difference) == ""


def test_methods_with_settings_of_their_own() -> None:
    common = load_config(ROOT / "configs/lora.py")
    chosen = chosen_methods(["dora", "r64=dora adapter.rank=64 train.batch_size=4"])
    found = config_of(chosen["r64"], common)
    assert found.adapter.dora
    assert found.adapter.rank == 64
    assert found.train.batch_size == 4
    (narrow,) = chosen_methods(["attention=lora adapter.targets=q_proj v_proj"]).values()
    assert config_of(narrow, common).adapter.targets == ("q_proj", "v_proj")
    assert list(chosen_methods(["all"])) == list(METHODS)
    assert reference_of(chosen_methods(["dora", "lora"])) == "lora"
    assert reference_of(chosen) == "dora"


@pytest.mark.parametrize(
    ("entries", "error"),
    [
        (["dorra"], r"--methods dorra: .* did you mean dora\?"),
        (["r=dorra adapter.rank=1"], r"did you mean dora\?"),
        (["dora", "dora"], "names dora twice"),
        (["lora adapter.rank=1"], "needs a new name"),
        (["dora=lora adapter.rank=1"], "needs a new name"),
        (["../up=lora adapter.rank=1"], "needs a new name"),
        (["data=lora adapter.rank=1"], "needs a new name"),
        (["r=lora adapter.rnk=1"], r"--methods r: adapter.rnk: .* did you mean adapter\.rank\?"),
        (["r=lora adapter.rank=x"], r"--methods r: adapter.rank=x: "),
        (["r=lora adapter.rank"], r"--methods r: 'adapter.rank' is not of the form"),
        (["r=lora optim.learning_rate=1e-3"], "which a comparison varies itself"),
        ([], "--methods is empty"),
    ],
)
def test_methods_that_cannot_be(entries: list[str], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        chosen_methods(entries)


def test_a_resumed_method_has_the_same_settings(tmp_path: Path) -> None:
    config = Config(train=TrainConfig(output=str(tmp_path / "run")))
    resumed = dataclasses.replace(config, train=dataclasses.replace(config.train, resume="always"))
    folder = tmp_path / "run-comparison"
    prepare(folder, config, DESIGN, chosen_methods(["lora", "r=lora adapter.rank=4"]))
    prepare(folder, resumed, DESIGN, chosen_methods(["dora", "r=lora adapter.rank=4"]))
    with pytest.raises(ValueError, match="holds runs of r with other settings"):
        prepare(folder, resumed, DESIGN, chosen_methods(["r=lora adapter.rank=8"]))
    # Those that a resumed comparison leaves out are not forgotten.
    held = json.loads((folder / "design.json").read_text())["methods"]
    assert set(held) == {"lora", "dora", "r"}


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"rates": (1e-3, 1e-4, 1e-2)}, "the smallest first"),
        ({"common_rate": 2e-3}, "--common_rate 0.002 is not one of --rates"),
        ({"search_seeds": 4}, "it must be 1 to 3"),
    ],
)
def test_a_design_that_cannot_be(values: dict[str, Any], error: str) -> None:
    usual = {"rates": (1e-4, 1e-3, 1e-2), "common_rate": 1e-3, "seeds": (0, 1, 2)}
    with pytest.raises(ValueError, match=error):
        Design(**{"search_seeds": 1, **usual, **values})


def test_validation_rows_are_split_in_two_halves(tmp_path: Path) -> None:
    rows = [{"question": str(i), "answer": str(i)} for i in range(5)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = Config(data=DataConfig(train=(str(file),), validation=(str(file),)))
    split = with_two_sets(whole, tmp_path / "data")
    found = {}
    for entry in split.data.validation:
        name, path = entry.split("=")
        lines = Path(path).read_text().splitlines()
        found[name] = [json.loads(line) for line in lines]
    assert found == {"choose": rows[::2], "test": rows[1::2]}
    # Sets that are called choose and test stay as they are.
    assert with_two_sets(split, tmp_path / "again") == split
    # The first set is split; others show what is forgotten.
    data = DataConfig(train=(str(file),), validation=(f"main={file}", f"other={file}"))
    named = with_two_sets(Config(data=data), tmp_path / "named")
    names = [entry.partition("=")[0] for entry in named.data.validation]
    assert names == ["choose", "test", "other"]


def test_without_validation_rows_there_is_no_comparison(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "1", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"give data\.validation"):
        with_two_sets(Config(data=DataConfig(train=(str(file),))), tmp_path / "data")


@pytest.mark.slow
def test_the_script_compares_and_resumes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    few_devices: None,
    standard_promotion: None,
) -> None:
    argv = [
        *("compare.py", *config("lora"), *SHORT, "--train.steps", "2"),
        *(
            "--methods",
            "lora",
            "neftune",
            "prompt_tuning",
            "--rates",
            "1e-3",
            "3e-3",
            "1e-2",
            "--common_rate",
            "3e-3",
        ),
        *("--seeds", "0", "1", "--train.output", str(tmp_path / "run"), "--mesh.data", "1"),
    ]
    main = script_main("compare")
    monkeypatch.setattr("sys.argv", argv)
    main()
    folder = tmp_path / "run-comparison"
    report = (folder / "comparison.md").read_text()
    assert "| NEFTune |" in report
    assert "| prompt tuning | 2,560 |" in report  # what trains
    assert "prompt tuning: 20 virtual tokens before each sample" in report
    assert "compare.py" in report  # its command
    figures = json.loads((folder / "comparison.json").read_text())
    seeds = [run["seed"] for run in figures["methods"]["neftune"]["runs"] if run["rate"] == 3e-3]
    assert sorted(seeds) == [0, 1]
    # Its noise is in the program, and not in the leaves: it must not train with LoRA's program.
    curves = [figures["methods"][name]["runs"][0]["curve"] for name in ("lora", "neftune")]
    assert curves[0] != curves[1]
    for plot in ("rates.png", "curves.png"):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")
    # A resumed comparison trains nothing again.
    kept = (folder / "lora/search/results.jsonl").stat().st_mtime_ns
    monkeypatch.setattr("sys.argv", [*argv, "--train.resume"])
    main()
    assert (folder / "lora/search/results.jsonl").stat().st_mtime_ns == kept
    capsys.readouterr()
    # Another rate is another comparison.
    changed = [arg if arg != "1e-2" else "2e-2" for arg in argv]
    monkeypatch.setattr("sys.argv", [*changed, "--train.resume"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "rates is [" in error
    assert "but the comparison in" in error
