"""The command line: what it prints, and what it ends with when things go wrong."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click
import pytest

from certbench.cli import COMMANDS, cli, main
from certbench.cli.run import parse_seeds
from certbench.errors import UsageError
from certbench.plugins import installed

FAST_IBP = pytest.mark.skipif(
    "fast-ibp" not in installed().methods(), reason="certbench-fast-ibp is not installed"
)
DIGITS = "fast-ibp/digits-linf-0.1"
QUICK = ["--set", "train.epochs=1", "--set", "method.ramp_epochs=1", "--device", "cpu"]


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code is None or isinstance(caught.value.code, int)
    return caught.value.code or 0


def commands(group: click.Group) -> list[click.Command]:
    found: list[click.Command] = []
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        found += [command, *(commands(command) if isinstance(command, click.Group) else [])]
    return found


def test_every_command_has_a_summary_and_an_example() -> None:
    for command in commands(cli):
        assert command.help, command.name
        assert "Example:" in command.help, command.name


def test_summaries_known_without_import_are_those_of_the_commands() -> None:
    for name, summary in COMMANDS.items():
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        assert command.get_short_help_str(200).rstrip(".") == summary.rstrip("."), name


@FAST_IBP
def test_one_command_goes_from_a_recipe_to_a_leaderboard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert call("run", DIGITS, "--out", str(out), "--seeds", "0,1", *QUICK) == 0
    printed = capsys.readouterr()
    assert "digits-linf-0.1" in printed.out
    assert "fast-ibp" in printed.out
    assert "epoch 1/1" in printed.err, "plain progress lines off a terminal"
    assert {p.name for p in out.iterdir()} >= {"digits-linf-0.1.md", "digits-linf-0.1.csv", "results", "runs"}
    assert call("leaderboard", "check", str(out)) == 0
    board = out / "digits-linf-0.1.csv"
    board.write_bytes(board.read_bytes().replace(b"fast-ibp", b"fast-idp", 1))
    capsys.readouterr()
    assert call("leaderboard", "check", str(out)) == 1
    assert "digits-linf-0.1.csv" in capsys.readouterr().err
    assert call("leaderboard", "build", str(out)) == 0
    assert call("leaderboard", "check", str(out)) == 0
    assert call("run", DIGITS, "--out", str(out), "--seeds", "0,1", *QUICK) == 0
    assert "already recorded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "fast-ibp/digit-linf-0.1"], 2, ["unknown recipe"]),
        (["run", "absent.toml"], 2, ["cannot read recipe absent.toml"]),
        (["run"], 2, ["Missing argument", "certbench run --help"]),
        (["fly"], 2, ["No such command 'fly'"]),
        (["list", "cows"], 2, ["cows"]),
        (["run", "x", "--seeds", "0,0"], 2, ["--seeds takes different numbers"]),
        (["leaderboard", "show", "absent"], 2, ["absent"]),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    arguments: list[str], code: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments) == code
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1, error
    assert all(word in error for word in words), error
    assert "Traceback" not in error


@FAST_IBP
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("threat.radius=8/0", ["threat.radius", "8/0", "divides by zero"]),
        ("threat.radius=-1", ["threat.radius", "above 0"]),
        ("threat.radius=2", ["threat.radius", "at most at 1"]),
        ("train.epoch=3", ["'train.epoch'", "did you mean 'epochs'"]),
        ("method.lamda=3", ["'method.lamda'", "known"]),
        ("method.epochs=3", ["'method.epochs'", "did you mean 'train.epochs'?"]),
        ("certify.certifier=ibpp", ["unknown certifier 'ibpp'", "ibp"]),
        ("model=cnn-smal", ["unknown model 'cnn-smal'", "cnn-small"]),
        ("dataset=digit", ["digits"]),
    ],
)
def test_bad_values_are_refused_before_any_training(
    override: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = call("run", DIGITS, "--out", str(tmp_path / "out"), *QUICK, "--set", override)
    error = capsys.readouterr().err
    assert code == 2
    assert all(word in error for word in words), error
    assert "epoch 1/1" not in error
    assert "Traceback" not in error


@FAST_IBP
@pytest.mark.parametrize(
    ("key", "name"), [("dataset", "nosuch"), ("model", "cnn-smal"), ("model", "timm:nosuch")]
)
def test_a_wrong_name_in_the_last_recipe_is_refused_before_the_first_run(
    key: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"dataset": "digits", "model": "cnn-small"} | {key: name}
    lines = [*(f'{k} = "{v}"' for k, v in content.items()), "[method]", 'name = "fast-ibp"']
    (tmp_path / "last.toml").write_text("\n".join([*lines, "[threat]", 'radius = "0.1"']), encoding="utf-8")
    code = call("run", DIGITS, str(tmp_path / "last.toml"), "--out", str(tmp_path / "out"), *QUICK)
    error = capsys.readouterr().err
    assert code == 2 and f"{name!r}" in error and "last" in error
    assert not (tmp_path / "out").exists()


@FAST_IBP
def test_missing_data_names_the_command_and_the_other_runs_finish(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = ["fast-ibp/mnist-linf-0.4", DIGITS]
    code = call("run", *recipes, "--out", str(tmp_path / "out"), "--data", str(tmp_path / "none"), *QUICK)
    printed = capsys.readouterr()
    assert code == 3
    assert "certbench data fetch mnist" in printed.err
    assert "1 of 2 runs failed: fast-ibp/mnist-linf-0.4" in printed.err
    assert "digits-linf-0.1" in printed.out


@FAST_IBP
def test_an_output_folder_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert call("run", DIGITS, "--out", str(tmp_path / "file"), *QUICK) == 3
    error = capsys.readouterr().err
    assert "cannot write to" in error
    assert "choose another --out" in error


@FAST_IBP
def test_a_lost_loss_stops_one_run_with_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = call("run", DIGITS, "--out", str(tmp_path), *QUICK, "--set", "train.learning_rate=1e30")
    error = capsys.readouterr().err
    assert code == 3
    assert "NaN or infinite at step" in error
    assert "checkpoint" in error
    assert not list((tmp_path / "results").glob("**/*.parquet")) if (tmp_path / "results").exists() else True


def test_lists_are_json_where_a_program_reads_them(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("methods", "recipes", "suites", "datasets", "models", "certifiers", "plugins"):
        assert call("list", kind, "--json") == 0
        rows = json.loads(capsys.readouterr().out)
        assert isinstance(rows, list)
        assert call("list", kind) == 0
        shown = capsys.readouterr().out
        assert all(row["name"] in shown for row in rows)


def test_doctor_tells_versions_data_and_plugins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("doctor", "--data", str(tmp_path), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"]
    assert report["data"]["digits"].startswith("complete")
    assert report["data"]["mnist"].startswith("missing")
    assert set(report["methods"]) == set(installed().methods())


def test_seeds_are_different_numbers() -> None:
    assert parse_seeds("0, 2,1") == [0, 2, 1]
    assert parse_seeds(None) is None
    for bad in ("", "1,1", "-1", "a", "1;2"):
        with pytest.raises(UsageError):
            parse_seeds(bad)


def test_no_command_without_arguments_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 2
    assert "quickstart" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX knows them")
@FAST_IBP
def test_ctrl_c_leaves_a_run_that_resumes(tmp_path: Path) -> None:
    """A real process, a real SIGINT in the middle of training, and the same command again."""
    import signal
    import subprocess
    import time

    command = [sys.executable, "-m", "certbench", "run", DIGITS, "--out", str(tmp_path), "--device", "cpu"]
    command += ["--set", "train.epochs=16"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}

    def heed() -> None:
        """What a shell starts in the background ignores SIGINT, and so would its children."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stderr=pipe, stdout=pipe, text=True, env=one_thread, preexec_fn=heed)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/epoch-*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "the same command resumes" in error
    assert "Traceback" not in error
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=one_thread)
    assert done.returncode == 0, done.stderr
    assert "resumed after epoch" in done.stderr
