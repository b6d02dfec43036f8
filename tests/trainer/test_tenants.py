"""The recipe's tenants: what they inherit, what is refused, and what memory they are said to take."""

from __future__ import annotations

import dataclasses
from math import isnan
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen3MoeConfig

from lora.config import BankConfig
from lora.tenants import Tenant, attach_tenants
from moe.context import BatchContext, Slots, batch_context
from moe.convert import convert
from trainer.activations import micro_batches, saved_bytes, working_bytes
from trainer.adapter_plan import plan_adapters, table
from trainer.admission import Admission, AdmissionError, Need, admit
from trainer.documents import DataError
from trainer.model_shapes import model_shapes
from trainer.plan import admission as admitted_of
from trainer.progress import Progress
from trainer.recipe import RecipeError, load_recipe, recipe_fingerprint, recipe_to_yaml
from trainer.tenant_recipe import alone, batch_sizes, data_of
from trainer.tenants import Member, Tenants, Verdict

RECIPE = """\
model: {path: base}
data: {source: stdlib, include: ["json/*.py"], tokenizer: {kind: model}, sequence_length: 32}
train: {steps: 20, global_batch_size: 8, micro_batch_size: 2, lr: 2e-4, warmup_steps: 2, max_grad_norm: 0.5}
adapter:
  experts: {preset: expert-lora, r: 4}
  attention: {preset: lora, r: 2}
tenants:
  plain: {}
  own: {lr: 1e-3, steps: 10, seed: 7, micro_batch_size: 1, data: {include: ["email/*.py"]}}
  filed: {data: {source: files, include: ["texts/*.jsonl"], format: jsonl}}
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "tenants.yaml"
    file.write_text(RECIPE)
    return file


def problems(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_tenants_take_from_train_and_data_what_they_do_not_say(path):
    recipe = load_recipe(path)
    plain, own, filed = recipe.tenants.values()
    assert (plain.lr, plain.steps, plain.seed, plain.max_grad_norm) == (2e-4, 20, 0, 0.5)
    assert (own.lr, own.steps, own.seed, own.max_grad_norm, own.warmup_steps) == (1e-3, 10, 7, 0.5, 2)
    assert data_of(recipe, "plain") == recipe.data
    assert data_of(recipe, "own") == dataclasses.replace(recipe.data, include=("email/*.py",))
    assert filed.data.include == (str(path.parent / "texts/*.jsonl"),)
    assert filed.data.text_key == "text"
    assert batch_sizes(recipe) == [8, 4, 8]


def test_a_resolved_recipe_reads_back_as_itself(path, tmp_path):
    recipe = load_recipe(path)
    (tmp_path / "again.yaml").write_text(recipe_to_yaml(recipe))
    again = load_recipe(tmp_path / "again.yaml")
    assert again.tenants == recipe.tenants
    assert recipe_fingerprint(again) == recipe_fingerprint(recipe)


def test_what_changes_a_tenants_bits_changes_the_fingerprint(path):
    before = recipe_fingerprint(load_recipe(path))
    assert recipe_fingerprint(load_recipe(path, ["tenants.own.seed=8"])) != before
    assert recipe_fingerprint(load_recipe(path, ["tenants.own.data={include: [x.py]}"])) != before
    assert recipe_fingerprint(load_recipe(path, ["parallel.memory_gib=3"])) == before


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("adapter={}", "there is no 'adapter' section"),
        ("adapter.attention.preset=mola", "tenants cannot have preset mola"),
        ("parallel={workers: 2, ep: 2}", "with tenants write ep: 1"),
        ("model.attention_dropout=0.1", "draws from one stream for all tenants"),
        ("balance={aux_loss: micro_batch, aux_loss_coef: 0.1}", "their common base is frozen"),
        ("model.soft={kind: soft_moe, force: true}", "remove 'adapter' or model.soft"),
        ("model.experts_backend=minimal", "no room for the adapters of tenants on the experts; choose auto or grouped"),
        ("model.experts_backend=triton", "no room for the adapters of tenants on the experts; choose auto or grouped"),
        ("model.experts_backend=reference", "no room for the adapters of tenants on the experts; choose auto or"),
        ("checkpoint.mode=pec", "write wal or dense"),
        ("tenants.own.steps=21", "is more than train.steps=20"),
        ("tenants={a: {steps: 7}, b: {steps: 9}}", "train.steps=20, and every tenant has finished after 9"),
        ("model.trainable_experts=x.json", "trains weights of the base"),
        ("tenants.own.data={format: chat}", "all tenants read chat, or none does"),
        ("tenants.own.warmup_steps=10", "leaves nothing of its 10 steps"),
        ("tenants.own.data={source: files}", "needs an include of its own"),
        ("tenants.own.data={include: [../x.py]}", "leaves the standard library"),
        ("tenants.own.data={text_key: body}", "belongs to format: jsonl"),
        ("tenants.own.rate=1", "unknown key tenants.own.rate"),
        ("tenants.own.lr=-1", "tenants.own.lr must be more than 0"),
        ("tenants={a.b: {}}", "use letters, digits"),
        ("tenants=[own]", "tenants must be a mapping"),
    ],
)
def test_mistakes_are_named(path, override, words):
    assert words in problems(path, override)


def test_without_adapters_on_experts_tenants_have_any_backend(path):
    adapter = "adapter={attention: {preset: lora, r: 2}}"
    assert load_recipe(path, [adapter, "model.experts_backend=minimal"]).model.experts_backend == "minimal"


def test_a_misplaced_key_is_not_taken_for_a_tenants(path):
    assert "did you mean train.lr?" in problems(path, "data.lr=1")
    assert "did you mean tenants.own.lr" in problems(path, "tenants.own.learning_rat=1", "tenants.own.Lr=1")


def test_the_message_says_which_tenants_would_fit():
    needs = (Need("a", 1, 10, 20), Need("big", 1, 100, 200), Need("b", 1, 5, 5))
    Admission(50, needs, None).check()
    Admission(50, needs, 390).check()
    with pytest.raises(AdmissionError, match=r"389 B are free; a, big would fit: take out the others"):
        Admission(50, needs, 389).check()
    with pytest.raises(AdmissionError, match=r"349 B are free; a, b would fit"):
        Admission(50, needs, 349).check()
    with pytest.raises(AdmissionError, match="none of them would fit"):
        Admission(50, needs, 55).check()


def test_the_mean_loss_is_that_of_the_tenants_that_train(path):
    """Neither of one that has stopped, whose rows are still in the batch, nor of one that has finished."""
    recipe = load_recipe(path)
    members = [Member(name, alone(recipe, name), None, 3) for name in recipe.tenants]
    tenants = Tenants(recipe, members, None, None)
    run = SimpleNamespace(progress=Progress())
    tenants.last = Verdict([1.0, 4.0, 10.0], [1.0] * 3)
    assert (tenants.mean_loss(run, 10), tenants.mean_loss(run, 11)) == (5.0, 5.5)
    run.progress.tenants["filed"] = {"bad": 3, "bad_in_row": 3, "stopped": 7}
    assert (tenants.mean_loss(run, 10), tenants.mean_loss(run, 11)) == (2.5, 1.0)
    tenants.last = Verdict([float("nan"), 4.0, 10.0], [1.0] * 3)
    assert isnan(tenants.mean_loss(run, 11))


CONFIG = Qwen3MoeConfig(
    vocab_size=300, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True,
)  # fmt: skip


BOTH = {"experts": BankConfig("expert-lora", r=4), "attention": BankConfig("lora", r=2)}
CLAMPED = GptOssConfig(
    vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    num_local_experts=8, num_experts_per_tok=2, intermediate_size=32,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("banks", "config", "more"),
    [
        (BOTH, CONFIG, 1.005),
        ({"up": BankConfig("expert-lora", targets=("gate_up_proj",))}, CONFIG, 1.005),
        ({"down": BankConfig("expert-lora", targets=("down_proj",))}, CONFIG, 1.005),
        ({"out": BankConfig("lora", targets=("o_proj",), dropout=0.1)}, CONFIG, 1.005),
        ({name: dataclasses.replace(bank, dropout=0.1) for name, bank in BOTH.items()}, CONFIG, 1.005),
        (BOTH, CLAMPED, 1.1),  # its attention keeps in another way
    ],
    ids=["both", "up", "down", "out", "dropout", "clamped"],
)
def test_the_estimate_covers_what_a_pass_keeps_and_hardly_more(path, banks, config, more, dtype):
    model, shapes = tenants_model(config, banks, dtype)
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = kept_bytes(model)
    with kept:
        losses_of(model, ROWS)
    measured = sum(n for at, n in kept.found.items() if at not in known)
    recipe = dataclasses.replace(load_recipe(path, SIZES), adapter=banks)
    found = model_shapes(shapes, 2)
    placed, batches = found.resolve(banks), micro_batches(recipe, dtype.itemsize, 4, config.vocab_size)
    counted = sum(sum(saved_bytes(found, placed, batch).values()) for batch in batches[:2])
    assert measured <= counted <= more * measured, counted / measured
    admission = admit(recipe, shapes, 2, dtype.itemsize, 4, None)
    assert admission.base == dtype.itemsize * sum(
        p.numel() for name, p in model.named_parameters() if ".adapter." not in name
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) // 2
    assert [need.parameters for need in admission.needs] == [trained] * 3
    assert [need.state for need in admission.needs] == [trained * (2 * dtype.itemsize + 12 + 4)] * 3
    working = [working_bytes(placed, batch) for batch in batches]
    assert sum(need.activations for need in admission.needs[:2]) == counted + sum(working[:2])


@pytest.mark.parametrize("vocabulary", [64, 2048])
def test_the_estimate_covers_the_allocators_peak(path, vocabulary):
    config = Qwen3MoeConfig(**{**CONFIG.to_dict(), "vocab_size": vocabulary, "moe_intermediate_size": 96})
    model, shapes = tenants_model(config, BOTH, torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.stack(losses_of(model, ROWS)).sum().backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    admission = admit(dataclasses.replace(load_recipe(path, SIZES), adapter=BOTH), shapes, 2, 4, 4, None)
    gradients = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    counted = sum(need.activations for need in admission.needs[:2]) + gradients
    assert peak <= counted <= 1.3 * peak, counted / peak


def test_the_plan_of_banks_counts_every_tenants_copy(path):
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(path.parent / "base")
    recipe = load_recipe(path, [f"model.path={path.parent / 'base'}"])
    with pytest.raises(DataError, match="matches no file"):
        plan_adapters(recipe)
    (path.parent / "texts").mkdir()
    (path.parent / "texts" / "a.jsonl").write_text('{"text": "a"}\n' * 100)
    plan, one = plan_adapters(recipe), plan_adapters(dataclasses.replace(recipe, tenants={}))
    admission = admitted_of(recipe, None)
    assert plan.trainable == sum(plan.run.trained.values()) == 3 * one.trainable
    assert plan.kept + plan.working == sum(need.activations for need in admission.needs)
    assert [bank.added for bank in plan.banks] == [bank.added for bank in one.banks]
    assert "trainable, kept, memory: of all 3 tenants; operations: a token meets one tenant's copy" in table(plan)
    assert "tenants" not in table(one)
    rows = {tenant.name: tenant for tenant in plan.tenants}
    assert (rows["plain"].steps, rows["plain"].sequences, rows["plain"].tokens) == (20, 8, 20 * 8 * 32)
    assert (rows["own"].steps, rows["own"].sequences, rows["own"].tokens) == (10, 4, 10 * 4 * 32)
    assert (rows["filed"].files, rows["filed"].nbytes) == (1, 1400)
    filed = f"jsonl of files: {path.parent}/texts/*.jsonl"
    for told in ("text of stdlib: email/*.py", "text of stdlib: json/*.py", filed):
        assert told in table(plan)


ROWS = (128, 64)
SIZES = ("train.micro_batch_size=4", "tenants.own.micro_batch_size=2")


def tenants_model(config, banks, dtype):
    """A model with the banks of two tenants, and the shapes of its base."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    attach_tenants(model, banks, [Tenant("a", 0), Tenant("b", 1)], convert(model))
    return model, shapes


def losses_of(model, rows):
    """Of sequences of 32 tokens, which are the recipe's."""
    ids, slot_T = torch.arange(sum(rows)).view(-1, 32) * 7 % 64, torch.arange(2).repeat_interleave(torch.tensor(rows))
    with batch_context(BatchContext(slot_T=slot_T, slots=Slots(rows, ("", "")))):
        logits = model(input_ids=ids, use_cache=False).logits
    parts = zip(logits.split([n // 32 for n in rows]), ids.split([n // 32 for n in rows]), strict=True)
    return [model.loss_function(part, labels=own, vocab_size=model.config.vocab_size).float() for part, own in parts]


class kept_bytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of the storages that a forward keeps, by address."""

    def __init__(self, _model):
        self.found, self.alive = {}, []
        super().__init__(self._pack, lambda t: t)

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        self.found[storage.data_ptr()] = storage.nbytes()
        self.alive.append(storage)
        return tensor


def test_a_bank_that_tenants_have_is_in_the_schema_of_the_ordinary_adapter(path):
    assert load_recipe(path).adapter["experts"] == load_recipe(path, ["tenants={}"]).adapter["experts"]
    assert isinstance(load_recipe(path).adapter["experts"], BankConfig)
