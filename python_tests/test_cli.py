"""The command line: subcommands, errors without tracebacks, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from llada_kernels import cli
from llada_kernels.demo.corpus import read_corpus, train_tokenizer
from llada_kernels.model import Model
from llada_kernels.training import latest_checkpoint

from .training.conftest import tiny_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny AR checkpoint with a tokenizer."""
    path = tmp_path_factory.mktemp("ar")
    tokenizer = train_tokenizer(read_corpus(300_000).train[:200], 400)
    config = tiny_config(vocab_size=400, mask_token_id=399, eos_token_id=398, family="bailing_moe_v2", causal=True)
    Model(config).save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def test_train_resume_and_generate(checkpoint, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("for name in sorted(names):\n    print(name)\n" * 40)
    arguments = ["train", str(checkpoint), str(text), "--output", str(tmp_path / "run"), "--steps", "4", "--row-tokens", "64"]
    assert cli.main([*arguments, "--rows", "2", "--checkpoint-every", "2", "--block-size", "8"]) == 0
    assert "block-size plan" in capsys.readouterr().out
    newest = latest_checkpoint(tmp_path / "run")
    assert newest.name == "step_00000004" and not Model.from_pretrained(newest).config.causal
    assert cli.main([*arguments, "--rows", "2", "--checkpoint-every", "2", "--block-size", "8", "--resume"]) == 0
    assert cli.main(arguments) == 1
    assert "error: output: expected a directory without checkpoints" in capsys.readouterr().err
    assert cli.main(["generate", str(newest), "for name", "--gen-length", "8", "--block-length", "8"]) == 0
    assert "forwards" in capsys.readouterr().err
    (newest / "tokenizer.json").unlink()
    assert cli.main(["generate", str(newest), "for name", "--gen-length", "8", "--block-length", "8"]) == 1
    assert "tokenizer.json" in capsys.readouterr().err


def test_generate_refuses_an_ar_checkpoint(checkpoint, capsys):
    assert cli.main(["generate", str(checkpoint), "x"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_info(capsys):
    assert cli.main(["info", "--json"]) == 0
    assert "torch" in json.loads(capsys.readouterr().out)


def test_bad_arguments(capsys, tmp_path):
    assert cli.main(["generate", str(tmp_path / "nothing" / "there"), "x"]) == 1
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["fly"])
    assert stop.value.code == 2


def test_interrupt_is_clean(monkeypatch, capsys):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Demo, "run", interrupt)
    assert cli.main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_ctrl_c_in_the_demo(tmp_path):
    """SIGINT to the real program in the middle of training: status 130, a message, no traceback."""
    # A shell starts what is to run in the background with SIGINT ignored, and so all that comes of it, perhaps these tests.
    code = "import signal, sys; from llada_kernels.cli import main; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "sys.exit(main(['demo', '--quick', '--output', sys.argv[1]]))"
    command = [sys.executable, "-u", "-c", code, str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if "architecture" in line:
                    break
            time.sleep(1.0)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()  # a demo that goes on would slow down the tests that follow
    assert process.returncode == 130
    assert "interrupted" in errors and "Traceback" not in errors
