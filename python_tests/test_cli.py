"""The command line: subcommands, errors without tracebacks, Ctrl-C."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import signal
import subprocess
import sys
import time
import typing

import pytest
import torch

import llada_kernels.generation
from llada_kernels import cli
from llada_kernels.demo.corpus import read_corpus, train_tokenizer
from llada_kernels.generation.api import DECODING
from llada_kernels.model import Model
from llada_kernels.training import Trainer, latest_checkpoint

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


def test_generate_takes_the_options_of_the_python_function(checkpoint, tmp_path, monkeypatch, capsys):
    model = Model.from_pretrained(checkpoint).as_diffusion()
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    seen = []
    generate, load = Model.generate, Model.from_pretrained.__func__
    monkeypatch.setattr(Model, "generate", lambda self, prompt, **options: (seen.append(options), generate(self, prompt, **options))[1])
    monkeypatch.setattr(Model, "from_pretrained", classmethod(lambda *a, **k: (seen.append((*a[2:], k)), load(*a, **k))[1]))
    arguments = ["generate", str(tmp_path / "m"), "for", "--gen-length", "8", "--block-length", "8"]
    assert cli.main([*arguments, "--dtype", "bfloat16", "--device", "cpu", "--editing-threshold", "0.5", "--top-k", "3", "--top-p", "0.9",
                     "--temperature", "0.5", "--seed", "1", "--steps", "4"]) == 0, capsys.readouterr().err  # fmt: skip
    assert seen[0] == (torch.bfloat16, torch.device("cpu"), {"revision": None, "expert_dtype": None})
    assert {k: v for k, v in seen[1].items() if v is not None} == {
        "gen_length": 8, "block_length": 8, "editing_threshold": 0.5, "top_k": 3, "top_p": 0.9, "temperature": 0.5, "seed": 1, "steps": 4,
    }  # fmt: skip
    assert cli.main([*arguments, "--eos-early-stop", "--decoding", "llada2.0"]) == 0 and seen[-1]["eos_early_stop"] is True
    for options, message in (
        (["--device", "cuda:99"], "error: device: expected a device that PyTorch can use here, got 'cuda:99'"),
        (["--device", "nowhere"], "error: device: expected a device"), (["--expert-dtype", "int8"], "error: "),
        (["--cfg-scale", "2"], "error: cfg_scale: expected no value"), (["--top-p", "2"], "error: top_p: "),
    ):  # fmt: skip
        capsys.readouterr()
        assert cli.main([*arguments, *options]) == 1
        assert message in capsys.readouterr().err


def test_every_option_of_generate_is_one_of_the_python_function():
    known = inspect.signature(llada_kernels.generation.generate).parameters
    assert set(cli._GENERATE) <= set(known) and set(cli._GENERATE) <= {f.name for f in dataclasses.fields(cli.Generate)}
    choices, _ = typing.get_args(typing.get_type_hints(cli.Generate)["decoding"])
    assert list(typing.get_args(choices)) == list(DECODING)


def test_help_names_the_arguments(capsys):
    for command, names in (("generate", "MODEL PROMPT"), ("train", "MODEL TEXT [TEXT ...]")):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        out = capsys.readouterr().out
        assert names in out.splitlines()[0] and "STR STR" not in out


def test_errors_of_training(checkpoint, tmp_path, capsys):
    text, latin = tmp_path / "text.txt", tmp_path / "latin.txt"
    text.write_text("for name in names:\n" * 40)
    latin.write_bytes("caf\xe9".encode("latin-1"))
    small = ["--output", str(tmp_path / "run"), "--row-tokens", "64", "--rows", "2", "--block-size", "8"]
    for arguments, message in (
        ([], "error: texts: expected at least one text file, got none"),
        ([str(latin)], f"error: texts: expected UTF-8 text in {latin}, got 'utf-8' codec"),
        ([str(tmp_path / "none.txt")], "none.txt"), ([str(text), "--device", "nowhere"], "error: device: expected"),
        ([str(text), "--learning-rate", "1e39", "--steps", "2"], "error: the run has diverged: loss nan"),
        ([str(text), "--steps", "2.5"], None),
    ):  # fmt: skip
        try:
            assert cli.main(["train", str(checkpoint), *arguments, *small]) == 1
        except SystemExit:
            assert message is None  # tyro's own answer
        err = capsys.readouterr().err
        assert message is None or (message in err and "Traceback" not in err)
    assert latest_checkpoint(tmp_path / "run") is None


def test_training_at_another_precision_warns_of_a_short_plan_and_goes_on_from_a_checkpoint(checkpoint, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("for name in names:\n" * 40)
    small = ["--row-tokens", "64", "--rows", "2", "--block-size", "8", "--device", "cpu"]
    first = ["train", str(checkpoint), str(text), "--output", str(tmp_path / "a"), "--steps", "2", "--dtype", "bfloat16", *small]
    models = []
    run = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: (models.append(self.model), run(self))[1])
    assert cli.main([*first, "--gradient-checkpointing"]) == 0 and models[0].gradient_checkpointing
    assert "warning: plan: block size 8, the last, gets none of 2 steps" in capsys.readouterr().err
    newest = latest_checkpoint(tmp_path / "a")
    assert Model.from_pretrained(newest).dtype == torch.bfloat16
    assert cli.main([*first, "--resume", "--steps", "3"]) == 1
    assert "start a new run from that checkpoint" in capsys.readouterr().err
    assert cli.main(["train", str(newest), str(text), "--output", str(tmp_path / "b"), "--steps", "2", "--plan", "fixed", *small]) == 0
    assert "warning" not in capsys.readouterr().err


def test_training_from_a_hub_id_keeps_the_tokenizer(checkpoint, tmp_path, monkeypatch):
    load, tokenizer = Model.from_pretrained.__func__, cli._tokenizer(str(checkpoint))
    monkeypatch.setattr(Model, "from_pretrained", classmethod(lambda cls, path, *a, **k: load(cls, checkpoint, *a, **k)))
    monkeypatch.setattr(cli, "_tokenizer", lambda path: tokenizer)
    text = tmp_path / "text.txt"
    text.write_text("for name in names:\n" * 40)
    small = ["--row-tokens", "64", "--rows", "2", "--steps", "1", "--plan", "fixed", "--block-size", "8"]
    assert cli.main(["train", "owner/name", str(text), "--output", str(tmp_path / "run"), *small]) == 0
    saved = latest_checkpoint(tmp_path / "run") / "tokenizer.json"
    assert json.loads(saved.read_text()) == json.loads((checkpoint / "tokenizer.json").read_text())


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
