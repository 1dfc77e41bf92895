"""Outputs on a bucket: epath over fsspec, with a bucket in memory in place of gs:// and s3://.

Not covered: orbax's checkpoints. tensorstore writes them to Google's servers itself, without
fsspec, so the run here keeps them on the disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import jax
import numpy as np
import pytest
from checkpoint_cases import saved_model
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from fsspec.spec import AbstractFileSystem
from run_cases import SHORT, Main, config

import lorax_ft as lft
from lorax_ft.config import AdapterConfig
from lorax_ft.interop.bucket import output_path
from lorax_ft.lowrank.adapters import add_adapters
from lorax_ft.run.checkpoints import Checkpoints
from lorax_ft.run.checksums import find_damage, write_checksums
from lorax_ft.run.log import LOG, PLOT, Log, read_log
from lorax_ft.tree import flatten

SCHEMES = ("gs", "gcs", "s3")  # epath asks fsspec for gs:// under the name gcs


class Bucket(MemoryFileSystem):
    """A bucket: no folders, no renames, and objects that appear whole."""

    store: ClassVar[dict[str, Any]] = {}
    uploads: ClassVar[list[str]] = []
    fails = ""

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return "/" + str(path).partition("://")[2] if "://" in str(path) else str(path)

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        raise AssertionError("gcsfs would create the bucket")

    makedirs = mkdir

    def exists(self, path: str, **kwargs: Any) -> bool:
        return AbstractFileSystem.exists(self, path, **kwargs)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        assert mode in ("rb", "wb"), mode
        if mode == "wb":
            self.uploads.append(path)
            if self.fails and path.endswith(self.fails):
                raise RuntimeError("quota exceeded")
        return super()._open(path, mode, **kwargs)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Bucket]]:
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "uploads", [])
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    for scheme in SCHEMES:
        fsspec.register_implementation(scheme, Bucket, clobber=True)
    yield Bucket
    for scheme in SCHEMES:
        del _registry[scheme]
    epath.backend.fsspec_backend._get_filesystem.cache_clear()


def downloaded(url: str, folder: Path) -> Path:
    """A local copy of a folder on the bucket."""
    root = "/" + url.partition("://")[2]
    for name, content in Bucket.store.items():
        if name.startswith(f"{root}/"):
            file = folder / name.removeprefix(f"{root}/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.getvalue())
    return folder


def names(folder: str) -> list[str]:
    return sorted(path.name for path in epath.Path(folder).iterdir())


def run_options(url: str) -> list[object]:
    schedule = ["--optim.schedule", "constant", "--train.save_every", 2]
    return [*config("lora"), *SHORT, *schedule, "--train.output", url]


def keep_checkpoints_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def local(remote: Path, *, keep: int) -> Checkpoints:
        assert str(remote) == "gs://bucket/run/checkpoints"
        return Checkpoints(folder, keep=keep)

    monkeypatch.setattr("lorax_ft.run.setup.Checkpoints", local)
    monkeypatch.setattr("lorax_ft.run.folder.Checkpoints", local)


@pytest.mark.usefixtures("standard_promotion")
def test_a_run_on_a_bucket_equals_one_on_a_disk(
    main: Main,
    tmp_path: Path,
    bucket: type[Bucket],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    url = "gs://bucket/run"
    assert main(*run_options("disk"), "--train.steps", 3) == 0
    keep_checkpoints_in(tmp_path / "checkpoints", monkeypatch)
    assert main(*run_options(url), "--train.steps", 2) == 0
    assert [line["step"] for line in read_log(epath.Path(url))] == [0, 1, 2, 2]
    epath.Path(url, "notes.txt").write_text("mine")
    assert main(*run_options(url), "--train.steps", 3, "--train.resume", "never") == 2
    assert f"{url} already holds a run" in capsys.readouterr().err
    assert main(*run_options(url), "--train.steps", 3) == 0
    assert f"copy {url} to a local folder" in capsys.readouterr().out

    files = ["adapter", "config.json", "finished.json", "notes.txt", "tensorboard", LOG, PLOT]
    assert names(url) == files
    copy = downloaded(url, tmp_path / "copy")
    ours, expected = read_log(copy), read_log(tmp_path / "disk")
    assert [line["loss"] for line in ours if "loss" in line] == [
        line["loss"] for line in expected if "loss" in line
    ]
    model = lft.load_model(lft.ModelConfig().path)
    read_back = flatten(lft.load_peft(copy / "adapter", model))
    for path, leaf in flatten(lft.load_peft(tmp_path / "disk/adapter", model)).items():
        np.testing.assert_array_equal(read_back[path], leaf)

    assert (
        main(
            *run_options(url),
            "--train.steps",
            1,
            "--train.overwrite",
        )
        == 0
    )
    assert names(url) == files
    assert [line["step"] for line in read_log(epath.Path(url))] == [0, 1, 1]
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "checkpoints", "copy"}


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_models_and_adapters_on_a_bucket(scheme: str, tmp_path: Path, bucket: type[Bucket]) -> None:
    model = saved_model(tmp_path / "model")
    adapter = AdapterConfig(rank=2)
    params = add_adapters(model.params, adapter, layout=model.layout, key=jax.random.key(0))
    url = f"{scheme}://bucket/deep"
    lft.save_peft(f"{url}/adapter", params, model)
    assert bucket.uploads[-1].endswith("adapter_config.json")
    lft.load_peft(downloaded(f"{url}/adapter", tmp_path / "adapter"), model)

    lft.save_model(f"{url}/merged", params, model, shard_bytes=3000)
    assert bucket.uploads[-1].endswith("/config.json")
    lft.save_model(output_path(f"{url}/merged"), params, model)
    lft.save_model(tmp_path / "merged", params, model)
    copy = downloaded(f"{url}/merged", tmp_path / "copy")
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()
    }

    epath.Path(f"{url}/merged/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes.txt, which would be lost"):
        lft.save_model(f"{url}/merged", params, model)
    lft.save_model(f"{url}/merged", params, model, others="keep")
    assert "notes.txt" in names(f"{url}/merged")
    with pytest.raises(ValueError, match=r"config.json is a file"):
        lft.save_model(f"{url}/merged/config.json", params, model)


def test_an_upload_that_fails_leaves_no_marker(
    tmp_path: Path, bucket: type[Bucket], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved_model(tmp_path / "model")
    lft.save_model("gs://bucket/model", model.params, model)
    monkeypatch.setattr(bucket, "fails", ".safetensors")
    with pytest.raises(OSError, match=r"^gs://bucket/model cannot be written: quota exceeded$"):
        lft.save_model("gs://bucket/model", model.params, model)
    assert not epath.Path("gs://bucket/model/config.json").exists()


def test_checksums_of_a_checkpoint_on_a_bucket(bucket: type[Bucket]) -> None:
    folder = epath.Path("gs://bucket/checkpoints/2")
    values = folder / "state/d/values"
    values.write_text("1.5")
    write_checksums(folder)
    (folder / "commit_success.txt").write_text("")
    assert not find_damage(folder)
    values.write_text("2.5")
    assert find_damage(folder) == "state/d/values has another checksum"
    values.unlink()
    assert find_damage(folder) == "state/d/values is missing"


def test_a_log_on_a_bucket_is_there_after_each_upload(bucket: type[Bucket]) -> None:
    folder = epath.Path("gs://bucket/run")
    with Log(folder, trackers=(), settings={}) as log:
        log.write(1, {"loss": 1.5})
        assert not read_log(folder)
        log.upload()
        assert read_log(folder) == [{"step": 1, "loss": 1.5}]
    assert names("gs://bucket/run") == [LOG, PLOT]


def test_buckets_that_cannot_be_used(
    main: Main, bucket: type[Bucket], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(bucket, "fails", "")
    cases = {
        "s3://bucket/run": "orbax saves checkpoints to a local folder or gs:// only",
        "az://bucket/run": "az:// is not supported",
    }
    for url, message in cases.items():
        assert main("--train.output", url) == 2
        assert message in capsys.readouterr().err

    def denied(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no credentials")

    monkeypatch.setattr(bucket, "_open", denied)
    assert main("--train.output", "gs://bucket/run") == 2
    assert "gs://bucket/run cannot be written: no credentials" in capsys.readouterr().err


@pytest.mark.parametrize(("scheme", "extra"), [("gs", "gcs"), ("s3", "s3")])
def test_a_client_that_is_missing(scheme: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"install the client of {name}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ValueError, match=rf'run pip install "lorax_ft\[{extra}\]"'):
        output_path(f"{scheme}://bucket/run")


@pytest.mark.parametrize("scheme", ["gs", "s3", "hf"])
def test_one_slash_is_no_local_folder(scheme: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean {scheme}://bucket/run"):
        output_path(f"{scheme}:/bucket/run")
