"""Plans: topologies, operations and collectives counted by hand, the search, and the script."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from run_cases import ROOT, script_main
from zoo import TINY

from lorax_ft import sharding
from lorax_ft.config import Config, MeshConfig, ModelConfig, TrainConfig, load_config
from lorax_ft.models import splash
from lorax_ft.models.config import Experts
from lorax_ft.models.model import CausalLM, abstract_params
from lorax_ft.models.parts import rows_dot_general
from lorax_ft.plan.chips import parse_topology
from lorax_ft.plan.estimate import estimate
from lorax_ft.plan.flops import count_flops
from lorax_ft.plan.hlo import Traffic, traffic
from lorax_ft.plan.program import Program
from lorax_ft.plan.report import memory_parts, options
from lorax_ft.plan.search import Candidate, fastest, search
from lorax_ft.run.setup import check_rows
from lorax_ft.sharding import make_mesh


def test_topologies() -> None:
    pod = parse_topology("v5p:4x4x4", slices=2)
    assert (pod.chips, pod.devices, pod.chip.label) == (64, 128, "TPU v5p")
    assert pod.network == 3 * 180e9
    assert parse_topology("v5e:4x4").network == 2 * 90e9
    assert parse_topology("h100:8").devices == 8


@pytest.mark.parametrize(
    ("name", "slices", "error"),
    [
        ("v5x:4x4", 1, r"v5x is no known chip; known are v5e, v6e, .* did you mean v5"),
        ("v5e", 1, "--topology v5e does not exist; there are v5e:1x1, v5e:2x2, v5e:2x4"),
        ("v5e:3x3", 1, "--topology v5e:3x3 does not exist; there are"),
        ("h100:4x4", 1, "give the number of GPUs, such as h100:8"),
        ("h100:0", 1, "give the number of GPUs"),
        ("h100:8", 2, "--slices is for TPUs"),
        ("v5e:2x2", 0, "--slices is 0"),
    ],
)
def test_topologies_that_do_not_exist(name: str, slices: int, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        parse_topology(name, slices=slices)


def test_rows_that_do_not_divide() -> None:
    config = Config(train=TrainConfig(batch_size=12, microbatches=2))
    check_rows(config, make_mesh(MeshConfig(data=3), devices=jax.devices()[:3]))
    four = make_mesh(MeshConfig(data=2, fsdp=2), devices=jax.devices()[:4])
    with pytest.raises(
        ValueError, match=r"gives 6 rows, which .* = 4 devices; a batch_size of 8 or 16"
    ):
        check_rows(config, four)


def test_only_tpus_have_slices() -> None:
    """JAX numbers the hosts of GPUs as slices, across which fsdp may go."""

    def devices(platform: str) -> list[Any]:
        return [SimpleNamespace(platform=platform, slice_index=i // 2) for i in range(4)]

    assert sharding._slices(devices("tpu")) == 2
    assert sharding._slices(devices("gpu")) == 1
    assert sharding._slices(jax.devices()) == 1


def test_operations_by_hand() -> None:
    """3 × 4 by 4 × 5: 60 products; a scan counts each iteration, recomputation counts again."""
    w = jnp.ones((4, 4))

    def product(x: Any) -> Any:
        return x @ w

    def count(function: Any, *args: Any) -> int:
        return count_flops(jax.make_jaxpr(function)(*args).jaxpr)

    x = jnp.ones((3, 4))
    assert count(lambda x: x @ jnp.ones((4, 5)), x) == 2 * 60
    assert count(lambda x: lax.scan(lambda x, _: (product(x), None), x, length=7)[0], x) == 7 * 96
    assert count(lambda x: lax.cond(True, product, lambda x: x, x), x) == 96

    def recomputed(x: Any) -> Any:
        return jnp.sum(jnp.sin(jax.checkpoint(lambda x: product(jnp.sin(product(x))))(x)))

    # Two products forward, the first one recomputed, and two backward to x.
    assert count(jax.grad(recomputed), x) >= 5 * 96
    rows = jnp.array([1, 2], jnp.int32)
    kernels = jnp.ones((2, 4, 5))
    # Each of the three rows meets one of the two matrices.
    assert count(lambda x: lax.ragged_dot(x, kernels, rows), x) == 2 * 60


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_frozen_kernel_has_no_gradient_among_the_operations(dtype: str) -> None:
    """In 16 bits, too, where CPUs have a product with a backward pass of its own."""
    x, w = jnp.ones((3, 4), dtype), jnp.ones((4, 4), dtype)

    def loss(x: Any, w: Any) -> Any:
        layers = jax.checkpoint(lambda x, w: rows_dot_general(x, w, None))
        y, _ = lax.scan(lambda x, w: (layers(x, w), None), x, jnp.stack([w, w]))
        return jnp.sum(y.astype(jnp.float32) ** 2)

    def count(argnums: tuple[int, ...]) -> float:
        return count_flops(jax.make_jaxpr(jax.grad(loss, argnums))(x, w).jaxpr)

    # Two layers: 96 each forward, backward to x, and backward to W. A product that is recomputed
    # for W alone counts too.
    assert count((0,)) == 2 * 2 * 96
    assert count((0, 1)) >= 3 * 2 * 96


def test_operations_of_experts_on_a_mesh() -> None:
    """All devices together compute what one does; with room for all tokens, on average so much."""
    decoder = dataclasses.replace(TINY, experts=Experts(count=8, top_k=2, renormalized=True))
    model = CausalLM(config=dataclasses.replace(decoder, expert_products="ragged"))
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32)
    counts = []
    for mesh in (MeshConfig(), MeshConfig(fsdp=2, tensor=2), MeshConfig(data=2, expert=4)):

        def features(params: Any, tokens: Any) -> Any:
            return model.features(params, tokens)

        with jax.set_mesh(make_mesh(mesh)):
            traced = jax.make_jaxpr(features)(abstract_params(model.config), tokens)
        counts.append(count_flops(traced.jaxpr, used=1 / mesh.expert))
    # The same but for the weights of copies that are on other devices.
    np.testing.assert_allclose(counts, counts[0], rtol=0.03)


@pytest.mark.parametrize("devices", [1, 8])
def test_operations_of_a_kernel_on_a_mesh(devices: int) -> None:
    """Splash attention by 4 · T² · C a head; its blocks that the mask hides count too."""
    rows, tokens, heads, channels = 8, 256, 4, 32
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:devices])
    q = jnp.ones((rows, tokens, heads, channels))
    attend = functools.partial(
        splash.splash, windows=[None], which=jnp.zeros((), jnp.int32), scale=1.0, cap=None
    )

    def total(q: Any) -> Any:
        return jnp.sum(attend(q, q[:, :, :2], q[:, :, :2], None))

    forward = 4 * rows * heads * channels * tokens**2
    with jax.set_mesh(mesh):
        assert count_flops(jax.make_jaxpr(total)(q).jaxpr) == forward
        # Again forward, three products for the queries' gradient and four for the keys'.
        both = count_flops(jax.make_jaxpr(jax.grad(total))(q).jaxpr)
    assert 4.5 * forward <= both < 4.6 * forward


def test_collectives_of_a_compiled_program() -> None:
    """A sum over four devices in a scan of five iterations; a ring sends 2 · 3/4 of the array."""
    mesh = Mesh(jax.devices()[:4], ("data",))
    rows = NamedSharding(mesh, P("data"))
    whole = NamedSharding(mesh, P())

    def step(x: Any, w: Any) -> Any:
        def body(w: Any, _: Any) -> Any:
            return jnp.tanh(x.T @ x @ w), None

        return lax.scan(body, w, length=5)[0]

    jitted = jax.jit(step, in_shardings=(rows, whole), out_shardings=whole)
    arguments = jnp.ones((8, 16)), jnp.ones((16, 32))
    found = traffic(jitted.lower(*arguments).compile().as_text())
    assert set(found.count) == {"all-reduce"}
    # XLA may sum x.T @ x once before the loop, or what it is multiplied with in each iteration.
    once, in_loop = 1.5 * 16 * 16 * 4, 5 * 1.5 * 16 * 32 * 4
    assert found.total in (once, in_loop)


HLO = """
HloModule step

%body.1 (p: (f32[8], s32[])) -> (f32[8], s32[]) {
  %gather.2 = bf16[4,8]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], chain_id="3"
  %again.2 = bf16[4,8]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], chain_id="3"
  %permuted = (f32[16]{0}, f32[16]{0}, u32[]) collective-permute-start(%p)
  %scattered = f32[8]{0} reduce-scatter(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%condition.1 (p: (f32[8], s32[])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(6)
  ROOT %compare.1 = pred[] compare(%i, %constant.9), direction=LT
}

%labeled.1 (p: f32[8]) -> f32[8] {
  %shuffled = f32[8]{0} all-to-all(%p), replica_groups=[2,4]<=[8]
}

%skipped.1 (p: f32[8]) -> f32[8] {
  %zero = f32[8]{0} constant(0)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %loss = f32[8]{0} conditional(%i, %t, %t), branch_computations={%skipped.1, %labeled.1}
  %while.1 = (f32[8], s32[]) while(%t), condition=%condition.1, body=%body.1
  %sum = f32[100]{0} all-reduce(%a), replica_groups=mesh['a'=2,'b'=4] {'a'}, to_apply=%add
}
"""


def test_collectives_by_hand() -> None:
    found = traffic(HLO)
    assert found.count == {
        "all-gather": 6,
        "collective-permute": 6,
        "reduce-scatter": 6,
        "all-reduce": 1,
        "all-to-all": 1,
    }
    assert found.received == {
        "all-gather": 6 * 0.75 * 64,
        "collective-permute": 6 * 64,
        "reduce-scatter": 6 * 3 * 32,
        "all-reduce": 2 * 0.5 * 400,
        "all-to-all": 0.75 * 32,
    }


GIVEN = Config(
    model=ModelConfig(remat="full"),
    train=TrainConfig(batch_size=16),
    mesh=MeshConfig(data=16, fsdp=1),
)
TOPOLOGY = parse_topology("v5e:4x4")


def made_up(config: Config) -> Candidate:
    """Weights that meshes split, activations that microbatches and recomputation make smaller."""
    shards = config.mesh.fsdp * config.mesh.context
    weights = int(60e9 / shards / (4 if config.quant.format == "nf4" else 1))
    kept = {"none": 40e9, "products": 20e9, "mlp": 10e9, "full": 4e9}[config.model.remat]
    work = {"none": 4, "products": 4.5, "mlp": 5, "full": 6}[config.model.remat]
    if weights > TOPOLOGY.chip.memory:
        return Candidate(config=config, needed=weights)
    program = Program(
        weights=weights,
        trained=0,
        moments=0,
        batch=0,
        arguments=weights,
        temporaries=int(kept / config.train.microbatches),
        flops=work * 1e14,
        traffic=Traffic(count={}, received={"all-gather": 1e9 * config.mesh.fsdp}),
        seconds=0.0,
    )
    return Candidate(
        config=config,
        needed=program.total,
        program=program,
        estimate=estimate(program, config, TOPOLOGY),
        tried=True,
    )


def test_the_search_finds_what_fits() -> None:
    first = made_up(GIVEN)
    assert first.program is None
    found = search(made_up, first, TOPOLOGY, tries=6)
    best = fastest([first, *found], TOPOLOGY)
    assert best is not None
    # 8 chips leave room for the weights, and 16 for what "mlp" keeps in place of recomputing it.
    fitting = [each.config for each in found if each.fits(TOPOLOGY)]
    assert [(each.mesh.fsdp, each.model.remat) for each in fitting] == [(8, "full"), (16, "mlp")]
    assert options(best.config, GIVEN) == "--model.remat mlp --mesh.data 1 --mesh.fsdp 16"


def test_a_faster_config_is_found() -> None:
    mesh = MeshConfig(data=1, fsdp=16)
    first = made_up(dataclasses.replace(GIVEN, mesh=mesh))
    assert first.fits(TOPOLOGY)
    found = search(made_up, first, TOPOLOGY, tries=6)
    best = fastest([first, *found], TOPOLOGY)
    assert best is not None
    assert best.config.model.remat == "mlp"


def test_experts_are_split_before_other_weights() -> None:
    """Where a base does not fit: over an axis that divides their number."""

    def sparse(config: Config) -> Candidate:
        split = config.mesh.fsdp * config.mesh.expert
        return made_up(dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=split)))

    measured = []

    def measure(config: Config) -> Candidate:
        measured.append(config.mesh)
        return dataclasses.replace(sparse(config), config=config)

    search(measure, measure(GIVEN), TOPOLOGY, tries=6, experts=4)
    splits = [(mesh.fsdp, mesh.expert) for mesh in dict.fromkeys(measured)]
    assert splits[:5] == [(1, 1), (1, 2), (2, 1), (1, 4), (4, 1)]
    assert {expert for _, expert in splits} == {1, 2, 4}


def test_rows_that_are_too_long_for_a_chip_are_split() -> None:
    def long(config: Config) -> Candidate:
        return dataclasses.replace(made_up(config), needed=100e9 / config.mesh.context)

    given = dataclasses.replace(GIVEN, mesh=MeshConfig(data=1, fsdp=16))
    found = search(long, long(given), TOPOLOGY, tries=6)
    fitting = next(each.config for each in found if each.fits(TOPOLOGY))
    # Each group of 8 chips has one of the 16 rows at a time.
    assert options(fitting, given) == ("--train.microbatches 8 --mesh.fsdp 2 --mesh.context 8")


def test_few_tries_end_the_search() -> None:
    found = search(made_up, made_up(GIVEN), TOPOLOGY, tries=1)
    assert len([each for each in found if each.program is not None]) == 1


def test_nothing_fits() -> None:
    def huge(config: Config) -> Candidate:
        return Candidate(config=config, needed=10**12)

    found = search(huge, huge(GIVEN), TOPOLOGY, tries=6)
    assert fastest(found, TOPOLOGY) is None
    assert "nf4" in {each.config.quant.format for each in found}


def test_a_roofline_by_hand() -> None:
    """v5e: 197e12 operations, 819e9 bytes of memory, 180e9 of its two axes' links a second."""
    candidate = made_up(dataclasses.replace(GIVEN, mesh=MeshConfig(data=1, fsdp=16)))
    program, found = candidate.program, candidate.estimate
    assert program is not None
    assert found is not None
    assert found.compute == pytest.approx(6e14 / 197e12)
    assert found.network == pytest.approx(16e9 / 180e9)
    # Three passes over all weights, and the temporaries written and read.
    assert found.memory == pytest.approx((3 * 60e9 + 2 * 4e9) / 819e9)
    assert found.seconds == found.compute
    assert found.bound == "arithmetic"
    assert found.longest == found.compute + found.memory + found.network
    assert found.efficiency == 1
    assert found.tokens == 16 * 256
    parts = memory_parts(program)
    total = parts.pop("total")
    assert sum(parts.values()) == total == program.total


@pytest.fixture
def run_plan(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """scripts/plan.py with a command line, on the eight devices of the tests; its exit status."""
    # What the script sets for a process of its own goes back to what it was.
    changed = ("JAX_PLATFORMS", "TF_CPP_MIN_LOG_LEVEL", "XLA_FLAGS")
    tpu = ("TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES")
    for name in (*changed, *tpu, "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    main = script_main("plan")

    def call(*argv: object) -> int:
        monkeypatch.setattr("sys.argv", ["plan.py", *map(str, argv)])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return call


@pytest.mark.slow
def test_the_script_plans_for_gpus(
    run_plan: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    standard_promotion: None,
) -> None:
    config = load_config(ROOT / "configs/lora.py")
    fields = json.loads((Path(config.model.path) / "config.json").read_text())
    (tmp_path / "model").mkdir()
    # Without weights or a tokenizer.
    (tmp_path / "model/config.json").write_text(json.dumps(fields))
    status = run_plan(
        *("--config", ROOT / "configs/lora.py", "--model.path", tmp_path / "model"),
        *("--topology", "h100:2", "h100:4", "--mesh.fsdp", 2, "--tokens", 1e9, "--price", 3),
        *("--json", tmp_path / "plan.json", "--plot", tmp_path / "plan.png"),
    )
    said = capsys.readouterr()
    assert status == 0, said.err
    for words in ("It fits", "NVIDIA H100 SXM", "all-gather", "are estimates", "hours and $"):
        assert words in said.out
    two, four = json.loads((tmp_path / "plan.json").read_text())
    assert (two["chips"], four["chips"]) == (2, 4)
    # As many rows a chip: as much work.
    assert four["config"]["train"]["batch_size"] == 2 * two["config"]["train"]["batch_size"]
    assert four["flops_a_chip"] == pytest.approx(two["flops_a_chip"], rel=0.01)
    # 1.4 million parameters in float32, of which the embedding's rows and the kernels are halved.
    assert 2.5e6 < two["bytes_a_chip"]["weights"] < 3.5e6
    assert (tmp_path / "plan.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["--topology", "v5e:5x5"], "there are v5e:1x1"),
        (["--topology", "v5p:4x4x5"], "there are v5p:2x2x1"),
        (["--topology", "v99:4x4"], "v99 is no known chip; known are v5e"),
        (["--topology", "V5E:4x4"], "did you mean v5e?"),
        (["--topology", "h100:17"], "GPUs of one machine, which has at most 16"),
        (["--topology"], "--topology lacks its value"),
        (["--topology", "h100:4", "--mesh.fsdp", "3"], "does not fit 4 devices"),
        (["--topology", "h100:3"], "which do not divide over data × fsdp × expert = 3"),
        (["--topology", "h100:2", "--model.path", "nowhere"], "no model at nowhere"),
        (["--topology", "h100:2", "--data.max_length", "auto"], "data.max_length is auto"),
        (["--topology", "h100:2", "--mesh.expert", "2"], "has no experts"),
        (["--topology", "h100:12", "h100:5"], "is no whole number of rows on the 5 of h100:5"),
        (["--topology", "h100:4", "h100:6", "--mesh.fsdp", "4"], "does not fit 6 devices"),
        (["--tokens", "-1"], "--tokens is -1; it must be above 0"),
        (["--tokens", "nan"], "--tokens is nan; it must be above 0"),
        (["--tokens", "1e9", "--price", "0"], "--price is 0; it must be above 0"),
        (["--price", "2"], "--price is that of --tokens, which is not given"),
        (["--tries", "-1"], "--tries is -1; it must be 0 or more"),
        (["--plot", "plan.png"], "give several topologies"),
        (["--topology", "h100:2", "h100:4", "--plot", "plan.txt"], "ends in .png or .svg or .pdf"),
        (["--json", "nowhere/plan.json"], "the folder nowhere does not exist"),
        (["--json", "."], "--json . is a folder; give a file"),
    ],
)
def test_bad_input_is_one_line(
    run_plan: Callable[..., int],
    argv: list[str],
    error: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_plan("--config", ROOT / "configs/lora.py", *argv) == 2
    said = capsys.readouterr().err
    assert error in said
    assert said.count("\n") == 1
