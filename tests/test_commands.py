"""`lorax-ft COMMAND`, the scripts that are the same commands, and the files of --config."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from run_cases import ROOT, script_main

import lorax_ft as lft
from lorax_ft import cli
from lorax_ft.__main__ import COMMANDS, main
from lorax_ft.program import command, either


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    """`lorax-ft` with a command line; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["lorax-ft", *argv])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_and_a_script(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, name, "--help") == 0
    assert f"usage: lorax-ft {name}" in capsys.readouterr().out
    module = name.replace("-", "_")
    spec = importlib.util.spec_from_file_location("script", ROOT / "scripts" / f"{module}.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main is script_main(module)


def test_help_and_mistakes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch) == run(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert all(f"\n  {command} " in out for command in COMMANDS)
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("lorax_ft 0.")
    assert run(monkeypatch, "trian") == 2
    assert capsys.readouterr().err == "error: there is no command 'trian'; did you mean train?\n"
    assert run(monkeypatch, "quantize") == 2
    assert "commands: train, generate, chat" in capsys.readouterr().err


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lorax_ft", "train", "--adapter.rnak", "4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "did you mean --adapter.rank?" in done.stderr


def test_the_command_in_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["scripts/train.py", "--data.system", "be brief"])
    assert cli.command_line() == "python scripts/train.py --data.system 'be brief'"
    monkeypatch.setattr(sys, "argv", ["lorax-ft train", "--config", "pissa"])
    assert cli.command_line() == "lorax-ft train --config pissa"


def test_configs_by_name_and_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_file = lft.load_config(ROOT / "configs/pissa.py")
    saved = tmp_path / "config.json"
    saved.write_text(of_file.to_json())
    # Where there is no folder configs/, the package has the same files.
    monkeypatch.chdir(tmp_path)
    for name in ("pissa", "configs/pissa.py", "config.json"):
        assert lft.load_config(name) == of_file
    (tmp_path / "pissa.py").write_text("1 / 0")
    assert lft.load_config("pissa") == of_file
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        lft.load_config("pissa.py")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("lroa", None, r"no config file lroa; did you mean lora\?"),
        ("xyz", None, "no config file xyz; configs of the library: .*lora"),
        ("none.json", None, "no config file none.json"),
        ("c.toml", "", "neither a .py file with get_config"),
        ("c.json", "[1]", "c.json holds a list at the top"),
        ("c.json", "{", "c.json is not valid JSON"),
        ("c.json", '{"adapter": 3}', "c.json: section 'adapter' of the config is not an object"),
        ("c.json", '{"adapter": {"rnak": 3}}', "c.json: adapter.rnak is no option; .*adapter.rank"),
    ],
)
def test_bad_config_files(
    name: str, text: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        lft.load_config(name)


def test_messages_name_the_command_as_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "lorax-ft train": "lorax-ft convert-config",
        "/usr/lib/ipykernel_launcher.py": "lorax-ft convert-config",
        str(ROOT / "scripts/train.py"): f"python {ROOT}/scripts/convert_config.py",
    }
    for program, expected in names.items():
        monkeypatch.setattr(sys, "argv", [program, "--config", "lora"])
        assert command("convert-config") == expected


def test_no_message_names_a_script_that_a_pip_user_does_not_have() -> None:
    for file in (ROOT / "lorax_ft").rglob("*.py"):
        if file.name != "program.py":
            found = re.findall(r"scripts/\w+\.py|\w+\.py --\w+", file.read_text())
            assert not found, (file, found)


def test_a_refusal_says_what_the_user_can_type(monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ("lorax-ft merge", str(ROOT / "scripts/merge.py")):
        monkeypatch.setattr(sys, "argv", [program])
        assert either("save_peft(...)", "--target peft") == "--target peft"
    for program in ("/usr/lib/ipykernel_launcher.py", "/home/scripts/my.py", "/usr/bin/pytest"):
        monkeypatch.setattr(sys, "argv", [program])
        assert either("save_peft(...)", "--target peft") == "save_peft(...)"
