"""Text is split, tokenised and addressed so that every run sees the same samples."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.forked import start
from tests.trainer.cache_builder import load_when_told
from trainer import data as data_module
from trainer.data import DataBundle, DataError, PackedDataset, load, load_section
from trainer.documents import Document, held_out, matching_files, read_documents, scan
from trainer.recipe import load_recipe
from trainer.schema import DataSection, TokenizerSection
from trainer.tokenizer import END, byte_tokenizer, train_bpe

ROOT = Path(__file__).resolve().parents[2]
STDLIB = Path(sysconfig.get_paths()["stdlib"])
BPE = TokenizerSection(kind="bpe", vocab_size=400)
BYTES = TokenizerSection(kind="bytes", vocab_size=257)


def section(
    include: list[str], *, source: str = "stdlib", tokenizer: TokenizerSection = BPE, **more: object
) -> DataSection:
    fields = {"sequence_length": 16, "heldout_fraction": 0.2, **more}
    return DataSection(source=source, include=tuple(include), tokenizer=tokenizer, **fields)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def json_bundle(root: Path) -> DataBundle:
    return load_section(section(["json/*.py", "re/*.py"]), cache_root=root)


# ---- documents


def test_stdlib_files_are_the_librarys_own_text() -> None:
    files = matching_files(section(["*/*.py", "idlelib/**/*.py"]))
    names = [name for name, _ in files]
    assert names == sorted(set(names))
    assert "json/decoder.py" in names
    assert "idlelib/editor.py" in names
    for name in names:
        assert not {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(name.split("/")), name
    for name, text in read_documents(section(["json/*.py"])):
        assert text == (STDLIB / name).read_bytes().decode()


def test_pattern_without_a_match_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pattern 'nothing/\*\.py' matches no file in the standard library"):
        matching_files(section(["json/*.py", "nothing/*.py"]))
    with pytest.raises(DataError, match=r"matches no file in the file system"):
        matching_files(section([str(tmp_path / "*.txt")], source="files"))
    (tmp_path / "a.txt").write_text("alone")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="at least two"):
        scan(section([str(tmp_path / "*.txt")], source="files"))


def test_names_of_files_do_not_depend_on_where_they_lie(tmp_path: Path) -> None:
    found = []
    for place in ("here", "there/deep"):
        folder = tmp_path / place / "texts"
        (folder / "sub").mkdir(parents=True)
        for name in ("a.txt", "sub/b.txt", "sub/c.md"):
            (folder / name).write_text(f"text of {name}")
        found.append(scan(section([str(folder / "**/*.txt"), str(folder / "sub/*")], source="files")))
    assert found[0] == found[1]
    assert [document.name for document in found[0]] == ["a.txt", "sub/b.txt", "sub/c.md"]


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("fine")
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"bad\.txt: not UTF-8 at byte 3"):
        scan(section([str(tmp_path / "*.txt")], source="files"))


def test_jsonl(tmp_path: Path, root: Path) -> None:
    lines = [{"body": f"line {i} " + "word " * i, "mixed": i if i % 2 else "text"} for i in range(40)]
    path = tmp_path / "x.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    data = section([str(path)], source="files", format="jsonl", text_key="body", tokenizer=BYTES)
    assert [text for _, text in read_documents(data)] == [line["body"] for line in lines]
    bundle = load_section(data, cache_root=root)
    assert bundle.train_documents + bundle.heldout_documents == 40
    whole = b"\0".join(sorted(bytes_of(bundle.train) + bytes_of(bundle.heldout)))
    assert whole == b"\0".join(sorted(str(line["body"]).encode() for line in lines))

    for broken, message in [
        ("{oops", r"x\.jsonl:80: not JSON"),
        ('{"text": "a"}', r"x\.jsonl:80: no text under 'body'; it has 'text'"),
        ("[1]", r"x\.jsonl:80: no text under 'body'"),
        ('{"body": 3}', r"x\.jsonl:80: no text under 'body'"),
    ]:
        path.write_text("\n\n".join(map(json.dumps, lines)) + "\n" + broken)
        with pytest.raises(DataError, match=message):
            scan(data)


def bytes_of(part: PackedDataset) -> list[bytes]:
    """The documents of a byte-tokenised part."""
    documents: list[bytearray] = [bytearray()]
    for token in part.tokens:
        if token == 256:
            documents.append(bytearray())
        else:
            documents[-1].append(token)
    assert not documents[-1], "the part ends with the end of a document"
    return [bytes(document) for document in documents[:-1]]


@given(
    names=st.lists(st.text(min_size=1, max_size=6), min_size=2, max_size=60, unique=True),
    fraction=st.floats(0.001, 0.5),
    size=st.integers(1, 5000),
)
def test_split_takes_some_documents_and_never_all(names: list[str], fraction: float, size: int) -> None:
    documents = [Document(name, size, "") for name in names]
    chosen = held_out(documents, fraction, 32)
    assert 1 <= len(chosen) < len(names)
    assert chosen <= set(names)
    assert held_out(documents[::-1], fraction, 32) == chosen
    # Whether a document is held out does not change with what else there is, once one sequence is filled.
    if size >= 32 * 8 and len(names) > 2:
        fewer = held_out([d for d in documents if d.name != names[0]], fraction, 32)
        assert len(chosen.symmetric_difference(fewer) - {names[0]}) <= 1


# ---- tokenizers


def test_tokenizers_spell_every_text_back(json_bundle: DataBundle) -> None:
    loaded = AutoTokenizer.from_pretrained(json_bundle.tokenizer_dir)
    assert loaded.eos_token == END
    assert len(loaded) == json_bundle.vocab_size == 400
    text = "def f(x):\n\treturn  x  # é ∑ 🪱\r\n\x00\x7f"
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded(END)["input_ids"] == [loaded.eos_token_id]


def test_byte_tokens_are_the_bytes() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.get_vocab_size() == 257
    text = "".join(map(chr, range(0x250))) + "∑🪱"
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.token_to_id(END) == 256


def test_bpe_is_deterministic_over_processes() -> None:
    texts = [text for _, text in read_documents(section(["json/*.py"]))]
    code = (
        "import sys; from trainer.documents import read_documents; from trainer.schema import *;"
        "from trainer.tokenizer import train_bpe;"
        "d = DataSection(source='stdlib', include=('json/*.py',), sequence_length=16,"
        " tokenizer=TokenizerSection(kind='bpe', vocab_size=700));"
        "sys.stdout.write(train_bpe((t for _, t in read_documents(d)), 700).to_str())"
    )
    for seed, threads in (("1", "1"), ("2", "4")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert done.stdout == train_bpe(texts, 700).to_str()


def test_a_models_tokenizer_is_taken_over(json_bundle: DataBundle, root: Path, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(json_bundle.tokenizer_dir).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 400}))
    data = section(["json/*.py", "re/*.py"], tokenizer=TokenizerSection(kind="model"))
    bundle = load_section(data, cache_root=root, model_path=str(tmp_path))
    assert np.array_equal(bundle.train.tokens, json_bundle.train.tokens)
    assert bundle.vocab_size == 400
    assert bundle.key != json_bundle.key

    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 300}))
    with pytest.raises(DataError, match=r"400 tokens, .* 300 rows"):
        load_section(data, cache_root=root / "other", model_path=str(tmp_path))
    with pytest.raises(DataError, match="no usable tokenizer"):
        load_section(data, cache_root=root / "other", model_path=str(tmp_path / "none"))


def test_a_model_without_tokenizer_files_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "vocab_size": 257}))
    data = section(["json/*.py"], tokenizer=TokenizerSection(kind="model"))
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_section(data, cache_root=root, model_path=str(tmp_path))


# ---- packed cache


def test_every_document_is_packed_once_in_one_part(root: Path) -> None:
    data = section(["json/*.py", "re/*.py"], tokenizer=BYTES)
    bundle = load_section(data, cache_root=root)
    texts = sorted(text.encode() for _, text in read_documents(data))
    assert sorted(bytes_of(bundle.train) + bytes_of(bundle.heldout)) == texts
    assert bundle.heldout_documents == len(bytes_of(bundle.heldout)) >= 1
    assert bundle.train_documents == len(bytes_of(bundle.train))
    sample = bundle.train[3]
    assert sample.dtype == np.int64
    assert sample.shape == (16,)
    assert np.array_equal(sample, np.asarray(bundle.train.tokens[48:64]))
    assert len(bundle.train) == len(bundle.train.tokens) // 16
    for index in (-1, len(bundle.train)):
        with pytest.raises(IndexError):
            bundle.train[index]


def test_special_tokens_in_a_text_stay_text(tmp_path: Path, root: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"{name} before {END} after " * 9)
    bundle = load_section(section([str(tmp_path / "*.txt")], source="files", tokenizer=BYTES), cache_root=root)
    assert bundle.train_documents == len(bytes_of(bundle.train))


def test_unigram_entropy_is_the_cross_entropy_of_smoothed_counts(json_bundle: DataBundle) -> None:
    counts = Counter(json_bundle.train.tokens.tolist())
    total = sum(counts.values()) + json_bundle.vocab_size
    heldout = json_bundle.heldout.tokens.tolist()
    expected = -sum(math.log((counts[token] + 1) / total) for token in heldout) / len(heldout)
    assert json_bundle.unigram_entropy_nats == pytest.approx(expected, rel=1e-12)
    assert 0 < expected < math.log(400)


def test_key_follows_texts_and_settings(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"text {name} " * 40)

    def key(**more: object) -> str:
        data = section([str(tmp_path / "*.txt")], source="files", **more)
        return data_module._key(data, scan(data), None)

    base = key()
    assert key() == base
    assert len({base, key(sequence_length=8), key(heldout_fraction=0.3), key(tokenizer=BYTES)}) == 4
    (tmp_path / "b.txt").write_text("text B " * 40)
    assert key() != base


def test_too_little_text_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("few words")
    with pytest.raises(DataError, match=r"part has \d+ tokens, less than one sequence of 64"):
        load_section(
            section([str(tmp_path / "*.txt")], source="files", tokenizer=BYTES, sequence_length=64),
            cache_root=tmp_path / "cache",
        )
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_damaged_cache_is_built_again(tmp_path: Path) -> None:
    data = section(["json/*.py"], tokenizer=BYTES)
    first = load_section(data, cache_root=tmp_path)
    path = tmp_path / first.key / "train.bin"
    good = path.read_bytes()
    inode = path.stat().st_ino
    assert load_section(data, cache_root=tmp_path).key == first.key
    assert path.stat().st_ino == inode, "a whole cache is not built again"
    for damage in (good[:100] + bytes([good[100] ^ 1]) + good[101:], good[:-2], b""):
        path.write_bytes(damage)
        load_section(data, cache_root=tmp_path)
        assert path.read_bytes() == good


class Loader:
    """A process that loads what ``cache_builder`` names when it is told to."""

    def __init__(self, cache: Path) -> None:
        self.pipe, theirs = Pipe()
        self.process = start(load_when_told, theirs, cache, output=sys.__stderr__.fileno())
        theirs.close()
        assert self._received() == "ready"
        self.pid = self.process.pid

    def go(self) -> None:
        self.pipe.send("go")

    def result(self) -> tuple[str, list[int]]:
        """The key and the last sample, of a process that has ended well."""
        found = self._received()
        assert self.process.wait(timeout=30) == 0
        return found

    def _received(self) -> Any:
        assert self.pipe.poll(120), "it says nothing"
        return self.pipe.recv()


@pytest.fixture
def start_loader() -> Iterator[Callable[[Path], Loader]]:
    loaders: list[Loader] = []

    def begin(cache: Path) -> Loader:
        loaders.append(Loader(cache))
        return loaders[-1]

    yield begin
    for loader in loaders:
        loader.process.kill()
        loader.process.wait(timeout=30)


def test_processes_that_build_at_once_agree_on_one_cache(
    tmp_path: Path, start_loader: Callable[[Path], Loader]
) -> None:
    loaders = [start_loader(tmp_path) for _ in range(3)]
    for loader in loaders:
        loader.go()
    results = [loader.result() for loader in loaders]
    assert results == results[:1] * 3
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def test_a_process_waits_for_the_one_that_builds(tmp_path: Path, start_loader: Callable[[Path], Loader]) -> None:
    (tmp_path / "elsewhere").mkdir()
    builder = start_loader(tmp_path / "elsewhere")
    builder.go()
    result = builder.result()
    key = result[0]

    with (tmp_path / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = start_loader(tmp_path)
        waiting.go()
        # The system lists a process that waits for a lock behind an arrow.
        while not re.search(rf"-> FLOCK .* {waiting.pid} ", Path("/proc/locks").read_text()):
            assert waiting.process.poll() is None, "it built without the lock"
        (tmp_path / "elsewhere" / key).rename(tmp_path / key)
        inode = (tmp_path / key).stat().st_ino
    assert waiting.result() == result
    assert (tmp_path / key).stat().st_ino == inode, "it took what the other had built"


def test_a_killed_builder_leaves_neither_lock_nor_half_a_cache(
    tmp_path: Path, start_loader: Callable[[Path], Loader]
) -> None:
    loader = start_loader(tmp_path)
    loader.go()
    # The temporary folder is made under the lock, before the work begins.
    while not list(tmp_path.glob("*.tmp-*")):
        assert loader.process.poll() is None
    os.kill(loader.pid, signal.SIGKILL)
    loader.process.wait(timeout=30)
    assert len(list(tmp_path.glob("*.tmp-*"))) == 1

    successor = start_loader(tmp_path)
    successor.go()
    key, _ = successor.result()
    assert (tmp_path / key / "meta.json").exists()
    assert not list(tmp_path.glob("*.tmp-*"))


def test_load_reads_the_whole_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["data.include=[json/*.py, re/*.py]", "data.tokenizer.vocab_size=300", f"log.dir={tmp_path}"]
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", overrides)
    bundle = load(recipe, rank=1)
    assert capsys.readouterr().out == ""
    assert (tmp_path / "cache" / bundle.key).is_dir()
    load(recipe)
    assert "sequences of 128 tokens from a vocabulary of 300" in capsys.readouterr().out
