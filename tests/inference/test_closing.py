"""How a model ends: closed, dropped, cut short, or not opened at all."""

from __future__ import annotations

import gc
import os
import shutil
import weakref

import pytest

from inference.engine import LLM
from inference.errors import InferenceError
from inference.offload import Crossing
from inference.simulate import read_routing
from inference.transfer import SimulatedLink
from tests.inference.test_hybrid import EVEN
from trainer import cli


def test_a_closed_model_gives_back_what_it_held(model_folder, prompts):
    for crossing in (None, Crossing(link=SimulatedLink(rate=1e9), cpu=True, profile=EVEN)):
        with LLM(model_folder, 0.25, device="cpu", crossing=crossing) as llm:
            llm.generate(prompts[:2], 4)
            before, (file, _) = llm.stats(), llm.cache.store.files.place("lm_head.weight")
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file)
        with pytest.raises(InferenceError, match="was closed; open it again"):
            llm.generate(prompts[:1], 4)
        with pytest.raises(InferenceError, match="was closed; open the model again"):
            llm.cache.store.read(0, 0, llm.cache.layout, llm.cache.blocks_CB[0])
        assert llm.stats() == before
        if llm.executor is not None:
            assert llm.executor.transfers.source.ready_share == 0
            with pytest.raises(RuntimeError, match="after shutdown"):
                llm.executor.cpu.hand_over()
        llm.close()


def test_nothing_of_a_model_waits_for_the_garbage_collector(model_folder):
    llm = LLM(model_folder, 0.25, device="cpu", crossing=Crossing("next_gate", link=SimulatedLink()))
    llm.generate([[1, 2, 3]], 2)
    gc.collect()
    gc.disable()
    try:
        parts = [weakref.ref(part) for part in (llm.model, llm.cache, llm.engine, llm.executor.transfers.source)]
        del llm
        assert [part() for part in parts] == [None] * 4
    finally:
        gc.enable()


def test_what_ends_a_text_halfway_is_a_sentence_and_ends_the_trace(model_folder, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    opened = LLM.generate

    def cut(llm, *arguments, **settings):
        opened(llm, *arguments, **settings)
        os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)
        return opened(llm, *arguments, **settings)

    monkeypatch.setattr(LLM, "generate", cut)
    command = ["generate", str(folder), "--prompt", "The gate", "--expert-budget", "0.25"]
    assert cli.main([*command, "--trace", str(tmp_path / "t")]) == 2
    assert "generation failed: L0" in capsys.readouterr().err
    read_routing(tmp_path / "t")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer.json", "{}", "its tokenizer cannot be opened"),
        ("generation_config.json", "{", "not a generation config"),
        ("generation_config.json", "[]", "not a generation config"),
    ],
)
def test_a_damaged_file_beside_the_weights_is_named(model_folder, tmp_path, file, text, message):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / file).write_text(text)
    with pytest.raises(InferenceError, match=message):
        LLM(folder, device="cpu")
