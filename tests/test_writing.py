"""Files are written completely or not at all, through links and on a full disk."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from checkpoint_cases import random_model, saved_model
from data_cases import make_tokenizer

from lorax_ft.config import AdapterConfig
from lorax_ft.interop.folder import new_folder
from lorax_ft.interop.peft import save_peft
from lorax_ft.interop.save import save_model
from lorax_ft.lowrank.adapters import add_adapters

SAVED = {
    "save_model": "merged/config.json",
    "save_peft": "adapter/adapter_config.json",
    "save_gguf": "model.gguf",
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("save", SAVED)
def test_a_disk_that_is_full_leaves_the_place_as_it_was(tmp_path: Path, save: str) -> None:
    """A file size limit simulates the full disk: writes fail halfway."""
    old = tmp_path / SAVED[save]
    old.parent.mkdir(exist_ok=True)
    old.write_text("old")
    place = old if save == "save_gguf" else old.parent
    program = (
        "import resource, jax, lorax_ft as lft\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "from lorax_ft import cli, save_model, save_peft\n"
        "from lorax_ft.config import EMBEDDED_MODEL, AdapterConfig\n"
        "from lorax_ft.interop.save_gguf import save_gguf\n"
        "with cli.one_line_errors():\n"
        "    model = lft.load_model(EMBEDDED_MODEL)\n"
        "    config, key = AdapterConfig(), jax.random.key(0)\n"
        "    params = lft.add_adapters(model.params, config, layout=model.layout, key=key)\n"
        f"    {save}({str(place)!r}, params, model)\n"
    )
    options = {
        "capture_output": True,
        "text": True,
        "env": {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
    }
    done = subprocess.run([sys.executable, "-c", program], **options)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {place} cannot be written: ")
    assert re.search("File too large|4000 written", done.stderr)
    assert done.stderr.count("\n") == 1
    assert {path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {"old"}
    assert len([*tmp_path.iterdir()]) == 1


@pytest.mark.parametrize("failing", [1, 2])
def test_an_interruption_between_the_renames_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text("old")
    rename, calls = Path.rename, iter(range(1, 9))

    def interrupted(self: Path, target: Path) -> Path:
        if next(calls) == failing:
            raise KeyboardInterrupt
        return rename(self, target)

    def write() -> None:
        with new_folder(place) as new:
            (new / "config.json").write_text("new")
            monkeypatch.setattr(Path, "rename", interrupted)

    with pytest.raises(KeyboardInterrupt):
        write()
    assert (place / "config.json").read_text() == "old"
    assert len([*tmp_path.iterdir()]) == 1


def test_a_tokenizer_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        raise Exception("No space left on device (os error 28)")

    tokenizer = make_tokenizer()
    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    model = dataclasses.replace(random_model(), tokenizer=tokenizer)
    with pytest.raises(OSError, match=r"model cannot be written: the tokenizer: No space left"):
        save_model(tmp_path / "model", model.params, model)
    assert not [*tmp_path.iterdir()]


def test_folders_are_whole_or_absent(tmp_path: Path) -> None:
    folder = tmp_path / "deep/folder"
    for text in ("first", "second"):
        with new_folder(folder) as new:
            (new / "file").write_text(text)
        assert (folder / "file").read_text() == text
    with pytest.raises(RuntimeError), new_folder(folder) as new:
        raise RuntimeError(new)
    (folder / "notes").write_text("mine")
    with (
        pytest.raises(ValueError, match=r"holds notes, which would be lost"),
        new_folder(folder) as new,
    ):
        (new / "file").write_text("fourth")
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"file": "second", "notes": "mine"}
    assert [p.name for p in folder.parent.iterdir()] == ["folder"]
    (folder / "more").mkdir()
    (folder / "more/notes").write_text("mine too")
    with new_folder(folder, others="keep") as new:
        (new / "file").write_text("fifth")
    texts = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert texts == {"file": "fifth", "notes": "mine", "more/notes": "mine too"}
    assert [p.name for p in folder.parent.iterdir()] == ["folder"]
    with pytest.raises(ValueError, match=r"is a file"), new_folder(folder / "file"):
        pass


@pytest.mark.parametrize("exists", [True, False])
def test_links_are_written_through(tmp_path: Path, exists: bool) -> None:
    """Links to folders and files, whether these exist or not; the link stays a link."""
    model = saved_model(tmp_path / "model")
    params = add_adapters(
        model.params, AdapterConfig(rank=2), layout=model.layout, key=jax.random.key(0)
    )
    (tmp_path / "disk").mkdir()
    for name, save in (("merged", save_model), ("adapter", save_peft)):
        place = tmp_path / "disk" / name
        if exists:
            place.mkdir()
        (tmp_path / name).symlink_to(place)
        save(tmp_path / name, params, model)
        save(tmp_path / name, params, model)
        assert (tmp_path / name).readlink() == place
        assert any(place.glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["adapter", "merged"]


def test_an_overwritten_model_may_have_fewer_shards(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model")
    save_model(tmp_path / "copy", model.params, model, shard_bytes=3000)
    save_model(tmp_path / "copy", model.params, model)
    assert [path.name for path in (tmp_path / "copy").glob("*safetensors*")] == [
        "model.safetensors"
    ]
