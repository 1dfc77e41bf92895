"""Outputs on the hub: the real client, and a stand-in of the hub's API that it writes to."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from checkpoint_cases import saved_model
from hub_cases import Hub, environment, running_hub, use
from run_cases import ROOT, SHORT, Main, config

import lorax_ft as lft
from lorax_ft.config import AdapterConfig
from lorax_ft.interop.bucket import output_path
from lorax_ft.interop.hub import push_folder
from lorax_ft.lowrank.adapters import add_adapters

ID = "owner/tuned"
URL = f"hf://{ID}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub() as hub:
        use(hub, monkeypatch, tmp_path / "cache")
        yield hub


def files(folder: Path) -> dict[str, bytes]:
    found = {".gitattributes": b""}
    for file in folder.rglob("*"):
        if file.is_file():
            found[str(file.relative_to(folder))] = file.read_bytes()
    return found


def adapted(folder: Path) -> tuple[Any, Any]:
    model = saved_model(folder)
    adapter = AdapterConfig(rank=2)
    return model, add_adapters(model.params, adapter, layout=model.layout, key=jax.random.key(0))


def test_adapters_and_models_arrive_byte_for_byte(hub: Hub, tmp_path: Path) -> None:
    model, params = adapted(tmp_path / "base")
    lft.save_peft(URL, params, model)
    lft.save_peft(tmp_path / "adapter", params, model)
    assert hub.repos == {ID: files(tmp_path / "adapter")}
    assert hub.private == {ID}
    lft.save_model(output_path("hf://owner/merged"), params, model, shard_bytes=3000)
    lft.save_model(tmp_path / "merged", params, model, shard_bytes=3000)
    assert hub.repos["owner/merged"] == files(tmp_path / "merged")
    assert "model.safetensors.index.json" in hub.repos["owner/merged"]
    # The shards would be taken for the model, and no other file may go.
    hub.repos["owner/merged"]["notes.txt"] = b"mine"
    lft.save_model("hf://owner/merged", params, model)
    lft.save_model(tmp_path / "merged", params, model)
    assert hub.repos["owner/merged"] == files(tmp_path / "merged") | {"notes.txt": b"mine"}


def test_a_card_on_the_hub_that_a_person_wrote_is_kept(hub: Hub, tmp_path: Path) -> None:
    model, params = adapted(tmp_path / "base")
    lft.save_peft(URL, params, model)
    lft.save_peft(URL, params, model, training_notes="second")
    assert b"second" in hub.repos[ID]["README.md"]
    hub.repos[ID]["README.md"] = b"mine"
    hub.commits += 1
    lft.save_peft(URL, params, model, training_notes="third")
    assert hub.repos[ID]["README.md"] == b"mine"
    folder = tmp_path / "adapter"
    lft.save_peft(folder, params, model)
    (folder / "README.md").write_bytes(b"---\nlicense: mit\n---\nnewer, and mine")
    push_folder(folder, URL)
    assert hub.repos[ID]["README.md"].endswith(b"newer, and mine")


@pytest.mark.usefixtures("standard_promotion")
def test_a_run_is_pushed(
    hub: Hub, main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run = [*config("lora"), *SHORT, "--train.steps", 1, "--train.output", out]
    run += ["--train.push_to_hub", ID]
    assert main(*run, "--dry_run") == 0
    assert hub.repos == {}
    assert main(*run) == 0
    assert hub.repos == {ID: files(out / "adapter")}
    assert b"## Training" in hub.repos[ID]["README.md"]
    assert f"to {hub.url}/{ID}" in " ".join(capsys.readouterr().out.split())
    hub.fails = "commit"
    assert main(*run, "--train.overwrite") == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert "the disk of the hub is full" in error
    assert f"the run has ended well, and {out}/adapter holds its result" in error


@pytest.mark.slow
def test_scripts_write_to_the_hub(hub: Hub, tmp_path: Path) -> None:
    """In processes of their own, whose client reads HF_ENDPOINT and HF_TOKEN itself."""
    model = lft.load_model(lft.ModelConfig().path)
    adapter = AdapterConfig(rank=2)
    params = add_adapters(model.params, adapter, layout=model.layout, key=jax.random.key(0))
    folder = tmp_path / "adapter"
    lft.save_peft(folder, params, model, training_notes="- **Steps:** 7")
    given = ["--model", lft.ModelConfig().path, "--adapter", str(folder)]
    for script, options in {"merge": [], "export": ["--target", "peft"]}.items():
        command = [sys.executable, str(ROOT / f"scripts/{script}.py"), *given, *options]
        done = subprocess.run(
            [*command, "--output", f"hf://owner/{script}"],
            env=os.environ | environment(hub) | {"HF_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert f"hf://owner/{script}" in done.stdout
        assert ("which others do not have" in done.stdout) == (script == "export")
    assert hub.repos["owner/export"] == files(folder)
    lft.save_model(tmp_path / "merged", params, model, training_notes="- **Steps:** 7")
    assert hub.repos["owner/merge"] == files(tmp_path / "merged")


def test_credentials(
    hub: Hub, main: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    login = "run `hf auth login` or set HF_TOKEN"
    hub.denied = "others"

    def error(repository: str) -> str:
        assert main("--train.push_to_hub", repository) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    denied = f"error: hf://others/x: the token may not write there; {login}, with a token that may"
    assert denied in error("others/x")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert f"error: {URL}: the hub does not accept the token; {login}" in error(ID)
    monkeypatch.delenv("HF_TOKEN")
    assert f"error: {URL}: there is no token for the hub; {login}" in error(ID)
    assert hub.repos == {}


def test_a_hub_that_cannot_be_reached(
    hub: Hub, main: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del hub
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    assert main("--train.push_to_hub", ID) == 2
    message = capsys.readouterr().err
    assert f"error: {URL} cannot be written: Connect" in message
    assert message.count("\n") == 1


def test_the_hub_is_asked_before_its_client_is_imported() -> None:
    """huggingface_hub 2.4 does not import its module constants by itself."""
    lines = ["from lorax_ft.offline import hub_or_cache"]
    lines += ["with hub_or_cache('a/b', repo_type='model') as problem: print([problem])"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", "\n".join(lines)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (ran.stdout, ran.stderr) == ("['']\n", "")


def test_what_is_no_repository(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("hf://name", "hf://a/b/c", "hf://owner/", "hf://owner/a--b..c"):
        with pytest.raises(ValueError, match=r"^hf://"):
            output_path(url)
    assert str(output_path("hf://owner/name")) == "hf://owner/name"
    cases: dict[tuple[str, ...], str] = {
        ("--train.push_to_hub", "name"): "train.push_to_hub is name; it must be owner/name",
        ("--train.output", URL): f"use train.push_to_hub {ID} to upload its adapter",
        (
            *("--train.push_to_hub", ID, "--adapter.init", "pissa"),
            *("--quant.format", "nf4"),
        ): "adapter.init pissa changes the quantized base, which is not uploaded",
    }
    for options, message in cases.items():
        assert main(*options) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_a_model_is_not_pushed_over_its_base(hub: Hub, tmp_path: Path) -> None:
    model, params = adapted(tmp_path / "base")
    model = dataclasses.replace(model, source=ID)
    with pytest.raises(ValueError, match="is where the model was loaded from"):
        lft.save_model(URL, params, model)
    assert hub.repos == {}
